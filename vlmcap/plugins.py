"""A user's own parts: modules that register kinds beside ours, from files, importable names and installed distributions.

A plugin is code that the user names or installs. Nothing is ever loaded out of a checkpoint, which only says which
plugin its parts came from.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from pathlib import Path
from typing import Any

from vlmcap.config.kinds import MAKERS, SCHEMAS, maker_of
from vlmcap.errors import UserError, first_line

PLUGINS_VARIABLE = (
    "VLMCAP_PLUGINS"  # files and module names; in the environment, so that processes of the same run load them too
)
ENTRY_POINTS = {
    "vlmcap.encoders": "encoder",
    "vlmcap.projectors": "projector",
    "vlmcap.llms": "llm",
    "vlmcap.metrics": "metric",
    "vlmcap.data_formats": "data",
}
"""Group of entry points -> group of parts; the name of an entry point is the kind."""

_loaded: set[str] = set()


def take_plugins(given: Sequence[str]) -> list[str]:
    """The arguments of a program without its `--plugin X` and `--plugin=X`, whose modules are loaded.

    Raises:
        UserError: One of them cannot be loaded.
    """
    rest, names, arguments = [], [], iter(given)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag != "--plugin":
            rest.append(argument)
            continue
        name = value if equals else next(arguments, "")
        if not name:
            raise UserError(
                "--plugin has no value; give a Python file or an importable module: --plugin my_projector.py"
            )
        names.append(name)
    use_plugins(names)
    return rest


def use_plugins(names: Sequence[str]) -> None:
    """Loads plugins, here and in the processes that this one starts.

    Args:
        names: Python files or names of importable modules.

    Raises:
        UserError: One of them cannot be loaded, or registers nothing.
    """
    for name in names:
        path = Path(name).expanduser()
        full = str(path.resolve()) if name.endswith(".py") or path.is_file() else name
        _load(full)
        known = _named()
        os.environ[PLUGINS_VARIABLE] = os.pathsep.join(known if full in known else [*known, full])


def load_plugins() -> None:
    """Loads what the environment names and what is installed, once.

    Raises:
        UserError: A plugin that the environment names cannot be loaded.
    """
    for name in _named():
        _load(name)
    for point in _installed():
        if (key := f"{point.group}:{point.name}") in _loaded:
            continue
        _loaded.add(key)
        try:
            point.load()
        except Exception as error:  # what is installed for another purpose must not keep a run from starting
            print(
                f"Warning: {_owner(point)[0]} is installed and left out, as it cannot be loaded ({_reason(error)}).",
                file=sys.stderr,
            )
            continue
        group = ENTRY_POINTS[point.group]
        if point.name not in MAKERS.get(group, {}):
            print(f"Warning: {_owner(point)[0]} is installed and registers no {group}={point.name}.", file=sys.stderr)


def _named() -> list[str]:
    return [name for name in os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep) if name]


def _load(name: str) -> None:
    if name in _loaded:
        return
    before = {(group, kind) for group, kinds in MAKERS.items() for kind in kinds}
    is_new = _import(name)
    _loaded.add(name)
    if is_new and before == {(group, kind) for group, kinds in MAKERS.items() for kind in kinds}:
        raise UserError(
            f"--plugin {name} registers no part; decorate its class or function with "
            "vlmcap.config.kinds.register_component"
        )


def _import(name: str) -> bool:
    """Imports a file or a module; returns whether it was not there before.

    A file is imported under its own name from its own folder, the last that is searched: it hides nothing, and
    processes of this run, which unpickle its classes, find it in the same way.
    """
    file = Path(name) if name.endswith(".py") else None
    module_name = name if file is None else file.stem
    if file is not None:
        if not file.is_file():
            raise UserError(f"--plugin {name} is no file; give a Python file or an importable module")
        if not module_name.isidentifier():
            raise UserError(
                f"--plugin {name} cannot be imported under the name {module_name}; rename it to letters, digits and _"
            )
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
    is_new = module_name not in sys.modules
    try:
        module = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as error:
        sys.modules.pop(module_name, None)
        raise UserError(f"--plugin {name} cannot be loaded ({_reason(error)}); correct it, or leave it out") from error
    if file is not None and Path(str(module.__file__)).resolve() != file.resolve():
        raise UserError(f"--plugin {name} has the name of another module, {module.__file__}; rename the file")
    return is_new


def _reason(error: BaseException) -> str:
    """Type, message and last line of an exception in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(point for group in ENTRY_POINTS for point in entry_points(group=group))


def _owner(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else (point.module, "")


# --- what a part came from --------------------------------------------------------------------------------------------


def plugin_kinds(group: str) -> list[str]:
    """Kinds of a group that plugins registered, sorted."""
    return sorted(kind for kind, schema in SCHEMAS.get(group, {}).items() if is_foreign(schema))


def plugins_of(config: Any) -> dict[str, dict[str, str]]:
    """Group to kind, plugin and version of each part of a configuration that a plugin brought, as plain data."""
    parts: dict[str, Any] = {group: getattr(config, group) for group in SCHEMAS}
    found = {group: part for group, part in parts.items() if is_foreign(type(part))}
    return {
        group: {"kind": part.kind, **origin(maker_of(group, part.kind) or type(part))} for group, part in found.items()
    }


def origin(part: Any) -> dict[str, str]:
    """Name and version of what brought a class or function.

    Its distribution, or its module with the SHA-256 of the file.
    """
    return _origin(part.__module__)


@cache
def _origin(module: str) -> dict[str, str]:
    top = module.partition(".")[0]
    for point in _installed():
        if point.module.partition(".")[0] == top and point.dist:
            return dict(zip(("name", "version"), _owner(point), strict=True))
    if names := packages_distributions().get(top):
        return {"name": names[0], "version": version(names[0])}
    content = Path(str(sys.modules[module].__file__)).read_bytes()
    return {"name": module, "version": f"sha256:{hashlib.sha256(content).hexdigest()}"}


def check_plugins(saved: Mapping[str, Mapping[str, str]]) -> None:
    """Checks that the plugins that a checkpoint names are loaded; another version of one is a warning.

    Args:
        saved: As `plugins_of` returned it when the checkpoint was written.

    Raises:
        UserError: One is not.
    """
    load_plugins()
    for group, part in saved.items():
        kind, name, wanted = part["kind"], part["name"], part["version"]
        is_file = wanted.startswith("sha256:")
        if kind not in MAKERS.get(group, {}):
            fix = (
                f"give its file by --plugin, or import it before vlmcap.load (its {wanted[:19]})"
                if is_file
                else f"install {name} {wanted}"
            )
            raise UserError(f"the checkpoint has {group}={kind} of the plugin {name}, which is not loaded; {fix}")
        found = origin(MAKERS[group][kind])
        if found["version"] != wanted:
            print(
                f"Warning: {group}={kind} was trained with {name} {wanted[:19]}, and {found['name']} "
                f"{found['version'][:19]} is loaded.",
                file=sys.stderr,
            )


def is_foreign(part: Any) -> bool:
    """Whether a class or function is no part of this package."""
    return bool(part.__module__.partition(".")[0] != "vlmcap")
