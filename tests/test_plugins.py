"""Plugins: where they come from, what they add to the configuration, and what a checkpoint says of them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins import GATED, own_registries, plugin_file
from vlmcap.compose import compose, from_plain, to_config, to_plain
from vlmcap.config_files import group_choices
from vlmcap.config_hash import config_hash
from vlmcap.errors import UserError
from vlmcap.plugins import PLUGINS_VARIABLE, check_plugins, load_plugins, plugins_of, take_plugins, use_plugins


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with own_registries(monkeypatch):
        yield


def test_a_kind_of_a_plugin_needs_no_file(tmp_path: Path) -> None:
    use_plugins([plugin_file(tmp_path, "my_gated", GATED)])
    config = compose(["projector=gated", "projector.expansion=3", "projector.frame_stack=2"])
    assert (config.projector.name, config.projector.kind) == ("gated", "gated")
    assert config.projector.expansion == 3  # type: ignore[attr-defined]
    assert "gated" in group_choices("projector")
    again = to_config(from_plain(to_plain(config)))
    assert again.projector == config.projector
    with pytest.raises(UserError, match=r"projector=gatd does not exist; choose one of .*gated"):
        compose(["projector=gatd"])
    with pytest.raises(UserError, match=r"'depth' is not a key of this projector"):
        compose(["projector=gated", "projector.depth=2"])
    with pytest.raises(UserError, match=r"'expansion' is not a key of this projector, only of projector=gated"):
        compose(["projector=mlp", "projector.expansion=2"])


def test_a_yaml_file_of_the_same_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "projector").mkdir()
    (tmp_path / "projector" / "gated.yaml").write_text("# Wide.\ndefaults: [gated_schema]\nname: gated\nexpansion: 7\n")
    monkeypatch.setenv("VLMCAP_CONFIG_DIR", str(tmp_path))
    use_plugins([plugin_file(tmp_path, "my_gated", GATED)])
    assert compose(["projector=gated"]).projector.expansion == 7  # type: ignore[attr-defined]


def test_processes_of_the_same_run_load_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = plugin_file(tmp_path, "my_gated", GATED)
    assert take_plugins(["a=1", "--plugin", file, "-m", f"--plugin={file}"]) == ["a=1", "-m"]
    assert os.environ[PLUGINS_VARIABLE] == file
    with own_registries(monkeypatch):
        monkeypatch.setenv(PLUGINS_VARIABLE, file)
        load_plugins()
        assert "gated" in group_choices("projector")


def test_what_a_run_says_of_its_plugins(tmp_path: Path) -> None:
    file = plugin_file(tmp_path, "my_gated", GATED)
    use_plugins([file])
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    config = compose(["projector=gated"])
    assert plugins_of(config) == {"projector": {"kind": "gated", "name": "my_gated", "version": f"sha256:{digest}"}}
    assert plugins_of(compose([])) == {}
    check_plugins(plugins_of(config))


def test_another_file_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for source in (GATED, GATED + "# changed\n"):
        with own_registries(monkeypatch):
            use_plugins([plugin_file(tmp_path, "my_gated", source)])
            config = compose(["projector=gated"])
            found.append((config_hash(config), plugins_of(config)))
            check_plugins(found[0][1])
    assert found[0][0] != found[1][0]
    assert "projector=gated was trained with my_gated sha256:" in capsys.readouterr().err


def test_a_checkpoint_of_a_missing_plugin_is_refused_in_words() -> None:
    saved = {"projector": {"kind": "gated", "name": "my_gated", "version": "sha256:0123"}}
    with pytest.raises(
        UserError, match=r"has projector=gated of the plugin my_gated, which is not loaded; pass its file to --plugin"
    ):
        check_plugins(saved)
    saved["projector"]["version"] = "1.2"
    with pytest.raises(UserError, match=r"not loaded; install my_gated 1\.2"):
        check_plugins(saved)


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("broken", "x = 1\nraise KeyError('y')", r"cannot be loaded \(KeyError: .*y.* at broken\.py:2\)"),
        ("idle", "x = 1", "registers no component"),
        ("my-part", GATED, "use only letters, digits and _ in its name"),
        ("json", GATED, "has the name of another module"),
        (
            "taken",
            GATED.replace('"gated"', '"mlp"'),
            r"projector=mlp of taken is taken by vlmcap\.config\.projector; choose another kind",
        ),
        ("kindless", GATED.replace('kind: str = "gated"', "x: int = 1"), "GatedConfig has no kind"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused_in_words(name: str, source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        use_plugins([plugin_file(tmp_path, name, source)])
    assert "\n" not in str(error.value)


def test_what_is_no_file_and_no_module_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"--plugin /nowhere/a\.py does not exist"):
        use_plugins(["/nowhere/a.py"])
    with pytest.raises(UserError, match=r"--plugin no_such_module cannot be loaded \(ModuleNotFoundError"):
        use_plugins(["no_such_module"])
    with pytest.raises(UserError, match="--plugin has no value"):
        take_plugins(["--plugin"])


def install(folder: Path, module: str, source: str, points: str) -> None:
    """A distribution as pip leaves it in a folder of the search path."""
    plugin_file(folder, module, source)
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)


def test_an_installed_distribution_needs_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "vlm_gated", GATED, "[vlmcap.projectors]\ngated = vlm_gated:GatedProjector\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    config = compose(["projector=gated"])
    assert plugins_of(config) == {"projector": {"kind": "gated", "name": "vlm_gated", "version": "1.2"}}


def test_a_broken_distribution_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = "[vlmcap.projectors]\ngated = vlm_broken:Gone\n[vlmcap.encoders]\nother = vlm_broken\n"
    install(tmp_path, "vlm_broken", "x = 1\n", points)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert compose([]).projector.kind == "pixel_shuffle"
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[:5] for line in told] == [["Warning:", "the", "installed", "plugin", "vlm_broken"]] * 2
    assert "is ignored, because it cannot be loaded (AttributeError" in "".join(told)
    assert "does not register encoder=other" in "".join(told)
