"""Wheel, source distribution, image, workflow and citation: what is published agrees with pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import vlmcap

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]


def read_yaml(path: str) -> dict[str, Any]:
    # `on` is a word of the workflow's language, which YAML 1.1 reads as true.
    text = re.sub(r"^on:", "'on':", (ROOT / path).read_text("utf-8"), flags=re.MULTILINE)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


# --- wheel and source distribution ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built as `make dist` does: the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def files_below(folder: str) -> set[str]:
    """Files of the checkout in a folder, without what running leaves there."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


@pytest.mark.slow
def test_the_wheel_holds_code_settings_pages_and_license(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    info = f"vlmcap-{vlmcap.__version__}.dist-info"
    expected = files_below("vlmcap") | files_below("hydra_plugins") | {f"vlmcap/{name}" for name in files_below("conf")}
    assert {name for name in names if not name.startswith(info)} == expected
    assert {"vlmcap/conf/encoder/siglip2.yaml", "vlmcap/reporting/report/web/page.css", "vlmcap/py.typed"} <= names
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names


@pytest.mark.slow
def test_the_source_distribution_is_a_checkout_that_can_be_tested(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("vlmcap", "conf", "hydra_plugins", "tests", "tools", "docs", "examples", "benchmarks", "experiments")
    files = {"Makefile", "constraints.txt", "pyproject.toml", "LICENSE", "README.md", "CITATION.cff", "train.py"}
    assert set().union(files, *map(files_below, folders)) <= names


@pytest.mark.slow
def test_the_package_index_would_take_them(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_a_fresh_environment_runs_the_installed_command(built: Path, tmp_path: Path) -> None:
    """The wheel is installed without its dependencies, which come from this environment, behind what is installed."""
    environment, elsewhere = tmp_path / "fresh", tmp_path / "다른 폴더"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    wheel = str(next(built.glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))

    def output_of(*command: str) -> str:
        return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True).stdout

    script, python = str(environment / "bin/vlmcap"), str(environment / "bin/python")
    assert output_of(python, "-c", "import vlmcap; print(vlmcap.__file__)").startswith(str(packages))
    assert "train" in output_of(script, "--help")
    assert "siglip2" in output_of(script, "train", "--help")  # read from the settings inside the wheel
    assert "num_frames" in output_of(script, "train", "--cfg", "job", "encoder=siglip2", "hardware=t4")


# --- what repeats pyproject.toml --------------------------------------------------------------------------------------


def test_citation_and_release_notes_name_the_version() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == vlmcap.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert [author["name"] for author in citation["authors"]] == [one["name"] for one in PROJECT["project"]["authors"]]
    assert citation["keywords"] == PROJECT["project"]["keywords"]
    headings = re.findall(r"^## \[(.+?)\]( - (?:\d{4}-\d\d-\d\d|not released yet))?$", changelog(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == vlmcap.__version__
    assert headings[1][1]


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_workflow_runs_the_checks_on_every_python_that_is_claimed() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == PYTHONS == ["3.11", "3.12", "3.13"]
    assert {"push", "pull_request"} <= workflow["on"].keys()
    commands = " ".join(step.get("run", "") for step in job["steps"])
    assert "make check docs test PYTHON=python${{ matrix.python }}" in commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"check", "test", "dist"} <= targets


@pytest.mark.parametrize("name", ["bug", "feature", "question"])
def test_a_template_for_issues_is_a_form(name: str) -> None:
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) >= 1
    assert all(field["attributes"]["label"] for field in fields)
    assert fields[0]["validations"] == {"required": True}


# --- image ------------------------------------------------------------------------------------------------------------

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def test_the_image_installs_the_pins_as_a_user_without_rights() -> None:
    (base,) = instructions("FROM")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    assert pins["torch"].startswith("2.13.")
    assert (
        base == "nvidia/cuda:13.0.1-base-ubuntu24.04"
    )  # PyTorch 2.13's wheels are built for CUDA 13.0; Python is 3.12
    assert "3.12" in PYTHONS
    runs = instructions("RUN")
    assert any("--constraint constraints.txt --requirement requirements.txt" in run for run in runs)
    assert any("--no-deps ." in run for run in runs)
    (user,) = instructions("USER")
    assert any(re.search(rf"useradd .*\b{user}\b", run) for run in runs)
    assert DOCKERFILE.index("USER ") > DOCKERFILE.rindex("RUN ")
    assert instructions("ENTRYPOINT") == ['["vlmcap"]']
    assert "--shm-size=" in DOCKERFILE


def test_the_image_is_given_what_its_wheel_is_built_from(tmp_path: Path) -> None:
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    target = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        "pyproject.toml",
        PROJECT["project"]["readme"],
        *PROJECT["project"]["license-files"],
        *target["only-include"],
    }
    assert needed | {"constraints.txt"} == copied
    ignored, *kept = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert ignored == "*"
    assert {line[1:] for line in kept if line.startswith("!")} == copied


def test_the_image_reads_the_dependencies_of_the_project(tmp_path: Path) -> None:
    """The one line of Python in it, run beside pyproject.toml."""
    (line,) = [found for run in instructions("RUN") for found in re.findall(r'python -c "(.*?)" >', run)]
    listed = subprocess.run(
        [sys.executable, "-c", line.replace("\\n", "\n").replace("sep='\n'", "sep='\\n'")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.splitlines() == PROJECT["project"]["dependencies"]
