"""Finds YAML files in the package's folder, and in a folder of the user that takes precedence."""

from __future__ import annotations

import os
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.plugins import load_plugins, plugin_kinds

# The user's folder is kept in the environment, so that other processes of the run find it.
CONFIG_DIR_VARIABLE = "VLMCAP_CONFIG_DIR"


def config_dir() -> str:
    """Returns the package's folder of YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def use_config_dir(folder: str | None) -> None:
    """Searches YAML files in a folder of the user first, in this process and in those that it starts.

    Args:
        folder: Folder with the layout of `conf/`, for example with `encoder/mine.yaml`; None keeps the present one.

    Raises:
        UserError: The folder does not exist.
    """
    if folder is None:
        return
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            f"--config-dir {folder} is not a folder; pass one with YAML files in subfolders such as encoder/ and llm/"
        )
    os.environ[CONFIG_DIR_VARIABLE] = str(path)


def config_dirs() -> list[Path]:
    """Returns the folders of YAML files, the user's first."""
    user_dir = os.environ.get(CONFIG_DIR_VARIABLE)
    return [*([Path(user_dir)] if user_dir else []), Path(config_dir())]


def config_file(name: str) -> Path:
    """Returns the file that Hydra reads for a name such as "hardware/l4"."""
    files = [folder / f"{name}.yaml" for folder in config_dirs()]
    return next((file for file in files if file.is_file()), files[-1])


def group_choices(group: str) -> list[str]:
    """Returns the sorted names of a group in `conf/`, in the user's folder and from plugins."""
    load_plugins()
    names = {*plugin_kinds(group)} | {file.stem for folder in config_dirs() for file in (folder / group).glob("*.yaml")}
    return sorted(name for name in names if name != "native")  # comes with a pretrained VLM and cannot be chosen alone
