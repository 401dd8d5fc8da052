"""The folders of YAML files: ours, and one of the user's own that is searched first."""

from __future__ import annotations

import os
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.plugins import load_plugins, plugin_kinds

CONFIG_DIR_VARIABLE = (
    "VLMCAP_CONFIG_DIR"  # a user's own YAML files; in the environment, so that processes of the same run find them too
)


def config_dir() -> str:
    """The folder of YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def use_config_dir(folder: str | None) -> None:
    """Takes YAML files from a folder of the user's own before ours, here and in the processes that this one starts.

    Args:
        folder: Laid out as `conf/`, such as with a file `encoder/mine.yaml`; None changes nothing.

    Raises:
        UserError: There is no such folder.
    """
    if folder is None:
        return
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            f"--config-dir {folder} is no folder; give one with YAML files in folders such as encoder/ and llm/"
        )
    os.environ[CONFIG_DIR_VARIABLE] = str(path)


def config_dirs() -> list[Path]:
    """The folders of YAML files, the user's own first."""
    own = os.environ.get(CONFIG_DIR_VARIABLE)
    return [*([Path(own)] if own else []), Path(config_dir())]


def config_file(name: str) -> Path:
    """The file that Hydra takes for a name such as "hardware/l4"."""
    files = [folder / f"{name}.yaml" for folder in config_dirs()]
    return next((file for file in files if file.is_file()), files[-1])


def group_choices(group: str) -> list[str]:
    """The names that a group has in `conf/`, in the user's own folder and from plugins, sorted."""
    load_plugins()
    names = {*plugin_kinds(group)} | {file.stem for folder in config_dirs() for file in (folder / group).glob("*.yaml")}
    return sorted(name for name in names if name != "native")  # comes with a whole model, and is not for choosing
