"""`vlmcap`: arguments, files, and mistakes, which end in one line and exit code 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmcap import cli
from vlmcap.cli import caption as caption_command
from vlmcap.cli.arguments import COMMANDS, is_override


def exits(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("is_made", [False, True])
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_made: bool
) -> None:
    video = tmp_path / "clip.mp4"
    if is_made:
        video.touch()
    code, err = exits(["caption", str(video), "--checkpoint", str(tmp_path / "missing.ckpt")], capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("Error: ")
    assert ("missing.ckpt" if is_made else "clip.mp4") in err


def test_an_output_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip.mp4").touch()
    code, err = exits(
        ["caption", str(tmp_path / "clip.mp4"), "--checkpoint", "x.ckpt", "--output", str(tmp_path / "no" / "f.jsonl")],
        capsys,
    )
    assert code == 2
    assert "--output" in err


def test_unknown_commands_and_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["captoin"], ["caption", "clip.mp4"]):
        assert exits(arguments, capsys)[0] == 2


def test_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(caption_command, "find_videos", interrupt)
    assert exits(["caption", str(tmp_path), "--checkpoint", "x.ckpt"], capsys) == (130, "Interrupted.\n")


# --- vlmcap cache -----------------------------------------------------------------------------------------------------


def test_help_loads_nothing_slow() -> None:
    script = (
        "import sys\nfrom vlmcap.cli import main\n"
        "try:\n    main(['cache', 'build', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'torch', 'hydra', 'numpy', 'transformers', 'rich'}, "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "without loading its language model" in " ".join(done.stdout.split())
    assert done.stderr.strip() == ""


@pytest.fixture
def overrides(siglip_folder: Path, aihub_root: Path, tmp_path: Path) -> list[str]:
    """A configuration of which the encoder and the clips are there, and the language model is not."""
    return [
        "encoder=siglip2",
        f"encoder.checkpoint={siglip_folder}",
        "llm=qwen3_8b",
        "llm.checkpoint=/nowhere",
        "data=aihub",
        f"data.root={aihub_root}",
        "data.num_frames=2",
        "data.num_workers=0",
        f"paths.cache_dir={tmp_path / 'cache'}",
    ]


def test_features_are_built_listed_and_pruned(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = overrides[-1]
    cli.main(["cache", "info", where])
    assert capsys.readouterr().out.startswith("There are no features in ")
    cli.main(["cache", "build", *overrides, "cache.dtype=int8"])
    out = capsys.readouterr().out
    assert "encoding the train split: 6 clips, " in out
    assert "11 clips, " in out.splitlines()[-1]
    cli.main(["cache", "build", *overrides, "cache.dtype=int8"])
    assert "encoding" not in capsys.readouterr().out
    cli.main(["cache", "build", *overrides, "data.num_frames=4"])
    capsys.readouterr()
    keys = sorted(path.name for path in (tmp_path / "cache" / "features").iterdir() if path.is_dir())
    assert len(keys) == 2
    cli.main(["cache", "info", where])
    out = capsys.readouterr().out
    for part in (*keys, "int8", "float16", "4 uniform", "11", "kB", "RMS"):
        assert part in out, part
    cli.main(["cache", "verify", where])
    assert capsys.readouterr().out.startswith("All 22 clips in ")
    shard = next((tmp_path / "cache" / "features" / keys[0]).glob("[0-9]*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit) as ended:
        cli.main(["cache", "verify", where])
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.out.startswith("Damaged: 1 clips in 1 files of ")
    assert f"{shard}: the features of 1 clips differ from those that were written (first " in said.err
    cli.main(["cache", "verify", where])
    assert capsys.readouterr().out.startswith("All 21 clips in ")
    assert (
        f"'{keys[0]}'" in exits(["cache", "prune", "--key", keys[0], where], capsys)[1]
    )  # this process built it, so it is in use
    shutil.rmtree(tmp_path / "cache" / "features" / keys[0] / ".users")
    cli.main(["cache", "prune", "--key", keys[0], where])
    assert "freed" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cache" / "features").iterdir() if path.is_dir()] == [keys[1]]
    cli.main(["cache", "prune", "--all", where])  # this process built them, so they are in use
    assert f"Kept because a running program uses them: {keys[1]}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache" / "features" / keys[1] / ".users")  # as if it had ended
    cli.main(["cache", "prune", "--max-gib", "0", where])
    assert not (tmp_path / "cache" / "features" / keys[1]).exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cache"], "ACTION"),
        (["cache", "prune"], "--max-gib --all --key"),
        (["cache", "prune", "--key", "../../etc", "{where}"], "there is no feature store '../../etc'"),
        (["cache", "prune", "--max-gib", "-1", "{where}"], "--max-gib must be 0 or more"),
        (["cache", "info", "paths.cach_dir=x"], "paths.cache_dir"),
        (["cache", "build", "data.sampling=random", "{where}"], "data.sampling=random"),
        (["cache", "build", "tuning.encoder=lora", "{where}"], "tuning.encoder=lora"),
    ],
)
def test_mistakes_with_the_cache(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"paths.cache_dir={tmp_path}"
    code, err = exits([where if argument == "{where}" else argument for argument in arguments], capsys)
    assert code == 2
    assert expected in err


def test_a_picture_of_no_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "hardware=l4", "--output", str(tmp_path / "plan.png")])
    assert "add --grid" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# --- overrides everywhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [command.name for command in COMMANDS if command.name != "check-plugin"])
def test_every_command_takes_overrides_and_a_folder_of_yaml_files(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overrides are read: an unknown key is refused before anything is done, and so is a folder that does not exist."""
    needed = {
        "cache": ["cache", "info"],
        "data": ["data", "check"],
        "caption": ["caption", "x.mp4", "--checkpoint", "x.ckpt"],
        "export": ["export", "--checkpoint", "x.ckpt", "--output", str(tmp_path / "out")],
        "report": ["report", str(tmp_path)],
        "spectrum": ["spectrum", "--output", str(tmp_path / "out")],
    }.get(command, [command])
    code, err = exits([*needed, "ckpt_path=x"], capsys)
    assert code == 2
    assert "ckpt_path" in err
    assert "reads" in err if command in ("report", "dashboard") else "set checkpoint=x" in err
    code, err = exits([*needed, "--config-dir", str(tmp_path / "missing")], capsys)
    assert (code, "--config-dir" in err) == (2, True)


def test_an_override_may_stand_behind_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "set data.batch_size=4" in exits(["plan", "encoder=clip", "--json", "batch_size=4"], capsys)[1]
    assert "vlmcap plan -m encoder=clip,siglip2" in exits(["plan", "encoder=clip,siglip2"], capsys)[1]
    assert "unrecognized arguments: --encoder" in exits(["plan", "--encoder", "clip"], capsys)[1]


def test_a_video_with_an_equals_sign_is_no_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("epoch=1.mp4").touch()
    assert [is_override(text) for text in ("epoch=1.mp4", "hardware.accelerator=cpu", "videos/a=b.mp4", "x.mp4")] == [
        False,
        True,
        False,
        False,
    ]
