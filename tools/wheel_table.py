"""Prints which pinned packages have a wheel for each Python and platform: the table of docs/platforms.md.

    python -m tools.wheel_table

Only packages whose installed wheel is built for one platform are asked about; the others are pure Python. It takes some
minutes of network and downloads nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from packaging.tags import Tag
from packaging.utils import parse_wheel_filename
from pip._internal.commands import create_command
from pip._internal.models.target_python import TargetPython

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
# glibc 2.28 is that of Debian 10, Ubuntu 20.04 and RHEL 8; pip takes older macOS versions along by itself.
GLIBC = ("_2_5", "_2_12", "_2_17", "2014", "_2_24", "_2_26", "_2_27", "_2_28")
PLATFORMS = {
    "Linux x86-64": [f"manylinux{version}_x86_64" for version in GLIBC],
    "Linux arm64": [f"manylinux{version}_aarch64" for version in GLIBC],
    "macOS 14 arm64": ["macosx_14_0_arm64"],
    "Windows x86-64": ["win_amd64"],
}


def normalized(name: str) -> str:
    """The name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def compiled_pins() -> Iterator[tuple[str, str]]:
    """Name and version of each pinned package whose wheel holds compiled code."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line)
    compiled = set()
    for distribution in distributions():
        tags = re.findall(r"^Tag: (.*)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
        if tags and not any(tag.endswith("-any") for tag in tags):
            compiled.add(normalized(distribution.name))
    return ((name, version) for name, version in pins.items() if normalized(name) in compiled)


class WheelIndex:
    """Wheels of packages as the package index lists them to pip, each page fetched once."""

    def __init__(self) -> None:
        self._command = create_command("index")
        self._options, _ = self._command.parse_args(["versions", "any"])
        self._session = self._command._build_session(self._options)

    def wheel_tags(self, name: str, version: str) -> set[Tag]:
        """Tags of every wheel of exactly this version."""
        address = f"{self._options.index_url.rstrip('/')}/{normalized(name)}/"
        page = self._session.get(address, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        page.raise_for_status()
        wheels = (file["filename"] for file in page.json()["files"] if file["filename"].endswith(".whl"))
        parsed = (parse_wheel_filename(wheel) for wheel in wheels if wheel.split("-")[1] == version)
        return {tag for _, _, _, tags in parsed for tag in tags}


def accepted_tags(python: str, platforms: list[str]) -> set[Tag]:
    """Tags that pip takes for `--python-version` and `--platform`."""
    info = tuple(map(int, python.split(".")))
    target = TargetPython(platforms=platforms, py_version_info=info, implementation="cp")
    return {Tag(tag.interpreter, tag.abi, tag.platform) for tag in target.get_tags()}


def main() -> None:
    """Prints the table."""
    pins, index = list(compiled_pins()), WheelIndex()
    accepted = {
        (platform, python): accepted_tags(python, tags) for platform, tags in PLATFORMS.items() for python in PYTHONS
    }
    missing: dict[tuple[str, str], list[str]] = {cell: [] for cell in accepted}
    for name, version in pins:
        print(f"asking for {name} {version}", file=sys.stderr)
        published = index.wheel_tags(name, version)
        for cell, tags in accepted.items():
            if not tags & published:
                missing[cell].append(name)
    print(f"Without a wheel, of {len(pins)} packages with compiled code:\n")
    print("| | " + " | ".join(f"Python {python}" for python in PYTHONS) + " |")
    print("|---" * (len(PYTHONS) + 1) + "|")
    for platform in PLATFORMS:
        cells = (", ".join(missing[platform, python]) or "none" for python in PYTHONS)
        print(f"| {platform} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
