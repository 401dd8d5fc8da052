"""`make venv` with an interpreter that only pretends: what is cut short is finished, failures end in one sentence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERPRETER = r"""#!/bin/sh
packages=.venv/lib/python3.11/site-packages
case "$*" in
    *version_info*|*ensurepip*) exit 0;;
    *'version("pip")'*) [ -e $packages/pip-1.dist-info/RECORD ];;
    --version) echo Python 3.11.9;;
    "-m venv .venv")
        echo venv >> calls.txt
        mkdir -p .venv/bin $packages/pip-1.dist-info
        cp "$0" .venv/bin/python
        if [ "${PRETEND:-}" = cut_venv ]; then touch reached; exec sleep 60; fi
        touch $packages/pip-1.dist-info/RECORD;;
    "-m pip install"*)
        echo pip >> calls.txt
        mkdir -p $packages/half-1.dist-info
        case "${PRETEND:-}" in
            cut_pip) touch reached; exec sleep 60;;
            "") touch $packages/half-1.dist-info/RECORD;;
            *) echo "$PRETEND"; exit 1;;
        esac;;
    train.py*) echo "trained $*";;
    *) echo "unexpected: $*" >&2; exit 3;;
esac
"""
NO_NETWORK = """\
WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by 'NewConnectionError('x')': /simple/av/
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('x')': /simple/av/
ERROR: Could not find a version that satisfies the requirement av (from versions: none)
ERROR: No matching distribution found for av"""
ONE_RETRY = """\
WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by 'ReadTimeoutError('x')': /simple/av/
ERROR: Cannot install av==18 and av==19 because these package versions have conflicting dependencies."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose path has a space and Hangul, and an interpreter beside it whose path has a space too."""
    folder = tmp_path / "한글 폴더"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    interpreter = tmp_path / "my python" / "python3.11"
    interpreter.parent.mkdir()
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    return folder


def start(checkout: Path, target: str = "venv", pretend: str = "") -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    interpreter = checkout.parent / "my python" / "python3.11"
    return subprocess.Popen(
        ["make", target, f"PYTHON={interpreter}"],
        cwd=checkout,
        env=environment | {"PRETEND": pretend, "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make(checkout: Path, target: str = "venv", pretend: str = "") -> tuple[int, str, str]:
    """Exits code, standard output and standard error."""
    process = start(checkout, target, pretend)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def calls(checkout: Path) -> list[str]:
    """What the interpreter was asked to make or install since the last look."""
    log = checkout / "calls.txt"
    found = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def stamp(checkout: Path) -> Path:
    return checkout / ".venv" / ".installed"


def test_an_installation_is_made_once_and_again_where_versions_change(checkout: Path) -> None:
    code, out, _ = make(checkout)
    assert (code, calls(checkout)) == (0, ["venv", "pip"])
    assert out.endswith(".venv is ready.\n")
    assert make(checkout)[0] == 0
    assert calls(checkout) == []

    later = time.time() + 10
    for name in ("pyproject.toml", "constraints.txt"):  # as `git checkout` leaves them
        os.utime(checkout / name, (later, later))
    assert make(checkout)[0] == 0
    assert calls(checkout) == []

    with (checkout / "constraints.txt").open("a") as file:
        file.write("new==1.0\n")
    os.utime(checkout / "constraints.txt", (later + 10, later + 10))
    assert make(checkout)[0] == 0
    assert calls(checkout) == ["pip"]
    assert "new==1.0" in stamp(checkout).read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(("cut", "expected"), [("cut_venv", ["venv", "pip"]), ("cut_pip", ["pip"])])
def test_what_a_signal_cut_short_is_finished(
    checkout: Path, cut: str, expected: list[str], number: signal.Signals
) -> None:
    process = start(checkout, pretend=cut)
    deadline = time.monotonic() + 20
    while not (checkout / "reached").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not stamp(checkout).exists()
    calls(checkout)

    code, out, err = make(checkout, "demo")
    assert (code, calls(checkout)) == (0, expected), err
    assert out.endswith("trained train.py\n")
    assert stamp(checkout).exists()
    assert (checkout / ".venv/lib/python3.11/site-packages/half-1.dist-info/RECORD").exists()


def test_a_package_without_a_record_is_installed_again(checkout: Path) -> None:
    make(checkout)
    packages = checkout / ".venv/lib/python3.11/site-packages"
    stamp(checkout).unlink()
    (packages / "half-1.dist-info" / "RECORD").unlink()
    (packages / "~orch").mkdir()  # what an upgrade that was cut short leaves
    assert make(checkout, pretend="ERROR: stop here")[0] != 0
    assert {path.name for path in packages.iterdir()} == {"pip-1.dist-info", "half-1.dist-info"}
    assert not (packages / "half-1.dist-info" / "RECORD").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (NO_NETWORK, "The package index cannot be reached, or the connection broke"),
        ("pip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.", "The package index cannot be reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "The disk is full"),
    ],
    ids=["no network", "cut download", "full disk"],
)
def test_a_cause_that_is_known_is_one_sentence(checkout: Path, output: str, said: str) -> None:
    code, _, err = make(checkout, pretend=output)
    lines = [line for line in err.splitlines() if not line.startswith("make")]
    assert code != 0
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert "run make again" in lines[0]
    assert not stamp(checkout).exists()

    calls(checkout)
    assert make(checkout)[0] == 0
    assert calls(checkout) == ["pip"]


def test_other_failures_show_what_pip_says(checkout: Path) -> None:
    code, _, err = make(checkout, pretend=ONE_RETRY)
    assert code != 0
    assert "  ERROR: Cannot install av==18 and av==19" in err
    assert "The installation failed; .venv/install.log has the details" in err


def test_no_interpreter_is_one_sentence(checkout: Path) -> None:
    (checkout.parent / "my python" / "python3.11").unlink()
    code, _, err = make(checkout)
    assert code != 0
    assert err.startswith(
        "vlmcap needs Python 3.11, 3.12 or 3.13, and found none; on Debian and Ubuntu: sudo apt install"
    )
