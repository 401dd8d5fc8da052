"""Plugins: modules of a user that register kinds, from files, importable modules and installed distributions.

A plugin is code that the user names or installs. No code is ever loaded from a checkpoint, which only names the plugins
of its components.
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

# Files and module names are kept in the environment, so that other processes of the run load them too.
PLUGINS_VARIABLE = "VLMCAP_PLUGINS"
ENTRY_POINTS = {
    "vlmcap.encoders": "encoder",
    "vlmcap.projectors": "projector",
    "vlmcap.llms": "llm",
    "vlmcap.metrics": "metric",
    "vlmcap.data_formats": "data",
}
"""Entry point group -> group of the configuration; the name of an entry point is the kind."""

_loaded: set[str] = set()


def take_plugins(given: Sequence[str]) -> list[str]:
    """Loads the modules of `--plugin X` and `--plugin=X`, and returns the other arguments.

    Raises:
        UserError: A plugin cannot be loaded.
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
                "--plugin has no value; pass a Python file or an importable module, such as --plugin my_projector.py"
            )
        names.append(name)
    use_plugins(names)
    return rest


def use_plugins(names: Sequence[str]) -> None:
    """Loads plugins in this process and in those that it starts.

    Args:
        names: Python files or names of importable modules.

    Raises:
        UserError: A plugin cannot be loaded, or registers nothing.
    """
    for name in names:
        path = Path(name).expanduser()
        # Other processes may have another working folder, so a file is kept by its full path.
        full = str(path.resolve()) if name.endswith(".py") or path.is_file() else name
        _load(full)
        known = _named()
        # The order stays, as later plugins may import earlier ones.
        os.environ[PLUGINS_VARIABLE] = os.pathsep.join(known if full in known else [*known, full])


def load_plugins() -> None:
    """Loads the plugins that the environment names and those that are installed, once.

    Raises:
        UserError: A plugin that the environment names cannot be loaded.
    """
    for name in _named():
        _load(name)
    for point in _installed():
        # An entry point is loaded once, also if it has failed.
        if (key := f"{point.group}:{point.name}") in _loaded:
            continue
        _loaded.add(key)
        try:
            point.load()
        except Exception as error:  # an installed plugin that the run may not need must not stop it
            print(
                f"Warning: the installed plugin {_owner(point)[0]} is ignored, because it cannot be loaded "
                f"({_reason(error)}).",
                file=sys.stderr,
            )
            continue
        group = ENTRY_POINTS[point.group]
        if point.name not in MAKERS.get(group, {}):
            print(
                f"Warning: the installed plugin {_owner(point)[0]} does not register {group}={point.name}.",
                file=sys.stderr,
            )


def _named() -> list[str]:
    return [name for name in os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep) if name]


def _load(name: str) -> None:
    if name in _loaded:
        return
    # A plugin registers its components when it is imported; one without any is a mistake.
    before = {(group, kind) for group, kinds in MAKERS.items() for kind in kinds}
    is_new = _import(name)
    _loaded.add(name)
    if is_new and before == {(group, kind) for group, kinds in MAKERS.items() for kind in kinds}:
        raise UserError(
            f"--plugin {name} registers no component; decorate its class or function with "
            "vlmcap.config.kinds.register_component"
        )


def _import(name: str) -> bool:
    """Imports a file or a module, and returns whether it was not imported before.

    A file is imported under its own name from its own folder, which is appended to the search path. So it hides no
    other module, and other processes of the run, which unpickle its classes, find it in the same way.
    """
    file = Path(name) if name.endswith(".py") else None
    module_name = name if file is None else file.stem
    if file is not None:
        if not file.is_file():
            raise UserError(f"--plugin {name} does not exist; pass a Python file or an importable module")
        if not module_name.isidentifier():
            raise UserError(
                f"--plugin {name} cannot be imported as {module_name}; use only letters, digits and _ in its name"
            )
        # At the end of the search path, so that a plugin's folder does not hide other modules.
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
    is_new = module_name not in sys.modules
    try:
        module = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as error:
        # A module that has failed in the middle must not count as imported.
        sys.modules.pop(module_name, None)
        raise UserError(f"--plugin {name} cannot be loaded ({_reason(error)}); fix it, or leave it out") from error
    # A module of the same name may have been imported, or be earlier on the search path.
    if file is not None and Path(str(module.__file__)).resolve() != file.resolve():
        raise UserError(f"--plugin {name} has the name of another module, {module.__file__}; rename the file")
    return is_new


def _reason(error: BaseException) -> str:
    """Formats type, message and position of an exception in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(point for group in ENTRY_POINTS for point in entry_points(group=group))


def _owner(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else (point.module, "")


# --- origin of components ---------------------------------------------------------------------------------------------


def plugin_kinds(group: str) -> list[str]:
    """Returns the sorted kinds of a group that plugins registered."""
    return sorted(kind for kind, schema in SCHEMAS.get(group, {}).items() if is_foreign(schema))


def plugins_of(config: Any) -> dict[str, dict[str, str]]:
    """Returns kind, plugin and version of each group of a configuration that comes from a plugin, as plain data."""
    groups: dict[str, Any] = {group: getattr(config, group) for group in SCHEMAS}
    return {
        group: {"kind": settings.kind, **origin(maker_of(group, settings.kind) or type(settings))}
        for group, settings in groups.items()
        if is_foreign(type(settings))
    }


def origin(component: Any) -> dict[str, str]:
    """Returns name and version of the distribution of a class or function, or its module and the file's SHA-256."""
    return _origin(component.__module__)


@cache
def _origin(module: str) -> dict[str, str]:
    # 1. An installed plugin with an entry point.
    top = module.partition(".")[0]
    for point in _installed():
        if point.module.partition(".")[0] == top and point.dist:
            return dict(zip(("name", "version"), _owner(point), strict=True))
    # 2. The distribution that contains the module.
    if names := packages_distributions().get(top):
        return {"name": names[0], "version": version(names[0])}
    # 3. A file that was passed to --plugin: the hash of its content.
    content = Path(str(sys.modules[module].__file__)).read_bytes()
    return {"name": module, "version": f"sha256:{hashlib.sha256(content).hexdigest()}"}


def check_plugins(saved: Mapping[str, Mapping[str, str]]) -> None:
    """Checks that the plugins of a checkpoint are loaded; a different version prints a warning.

    Args:
        saved: Result of `plugins_of` when the checkpoint was written.

    Raises:
        UserError: A plugin is not loaded.
    """
    load_plugins()
    for group, saved_plugin in saved.items():
        kind, name, wanted = saved_plugin["kind"], saved_plugin["name"], saved_plugin["version"]
        is_file = wanted.startswith("sha256:")
        if kind not in MAKERS.get(group, {}):
            hint = (
                f"pass its file to --plugin, or import it before vlmcap.load (its {wanted[:19]})"
                if is_file
                else f"install {name} {wanted}"
            )
            raise UserError(f"the checkpoint has {group}={kind} of the plugin {name}, which is not loaded; {hint}")
        loaded = origin(MAKERS[group][kind])
        if loaded["version"] != wanted:
            print(
                f"Warning: {group}={kind} was trained with {name} {wanted[:19]}, but {loaded['name']} "
                f"{loaded['version'][:19]} is loaded.",
                file=sys.stderr,
            )


def is_foreign(component: Any) -> bool:
    """Returns whether a class or function is defined outside of this package."""
    return bool(component.__module__.partition(".")[0] != "vlmcap")
