"""Features of a configuration.

Made before the language model is loaded, read without an encoder, and the same losses as without them.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmcap
from tests import assembling
from tests.thinned import thinned
from vlmcap.assembly import features as features_module
from vlmcap.assembly import model as model_module
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.components import load_encoder
from vlmcap.assembly.model import Assembly
from vlmcap.compose import compose, from_plain, to_config
from vlmcap.config import Config, Split
from vlmcap.config_saved import saved_config
from vlmcap.demo.prepare import prepare
from vlmcap.models.encoders import VisionEncoder
from vlmcap.training.checkpoints.load import read_checkpoint
from vlmcap.training.objects import Run
from vlmcap.training.run import evaluate, train

MakeConfig = Callable[..., Config]
MakeRun = Callable[[Config], Run]
CACHED = ["cache.enabled=true", "cache.dtype=float32"]
SHORT = (
    "trainer.max_steps=3",
    "tuning.align_epochs=0",
    "tuning.epochs=1",
    "evaluation.every_n_epochs=9",
    "trainer.log_every_n_steps=1",
)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def fit(make_run: Callable[[Config], Run], config: Config) -> list[float]:
    """The losses of a run's training, which neither captions nor scores anything."""
    run = make_run(config)
    run.trainer.fit(run.module, datamodule=run.data)
    return losses(Path(config.paths.output_dir))


def predictions(folder: Path) -> list[str]:
    rows = [
        json.loads(line) for line in (folder / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [row["prediction"] for row in rows]


def assembled(config: Config) -> Assembly:
    config = prepare(config)
    torch.manual_seed(0)
    return assembling.assembled(config, load_splits(config, list(Split)))


def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, loading an encoder's weights is an error."""

    def meta_only(*arguments: Any, is_meta: bool = False) -> VisionEncoder:
        assert is_meta, "the encoder was loaded"
        return load_encoder(*arguments, is_meta=True)

    monkeypatch.setattr(features_module, "load_encoder", meta_only)
    monkeypatch.setattr(model_module, "load_encoder", meta_only)


@pytest.fixture(scope="module")
def decoded_losses(make_run: MakeRun, tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of three steps without a cache."""
    return fit(make_run, tiny_config(tmp_path_factory.mktemp("decoded"), *SHORT, "cache.enabled=false"))


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        pytest.param(["cache.dtype=float32"], 0, id="float32", marks=pytest.mark.slow),
        pytest.param(["cache.dtype=float32", "cache.pooled=true"], 0, id="float32 pooled"),
        pytest.param(["cache.dtype=float16"], 1e-4, id="float16"),
        pytest.param(["cache.dtype=float16", "cache.pooled=true"], 1e-4, id="float16 pooled", marks=pytest.mark.slow),
        pytest.param(["cache.dtype=int8"], 1e-3, id="int8"),
    ],
)
def test_losses_are_those_without_the_cache(
    settings: list[str],
    tolerance: float,
    decoded_losses: list[float],
    make_run: MakeRun,
    tiny_config: MakeConfig,
    tmp_path: Path,
) -> None:
    found = fit(make_run, tiny_config(tmp_path, *SHORT, *settings))
    assert len(decoded_losses) == 3
    assert found == pytest.approx(decoded_losses, rel=tolerance, abs=0)


@pytest.mark.slow
def test_a_checkpoint_from_pooled_features_captions_fresh_video(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    config = tiny_config(
        tmp_path / "run", *SHORT, "cache.pooled=true", "cache.dtype=float32", "tuning.projector_lr=0.05"
    )
    train(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = to_config(from_plain(read_checkpoint(checkpoint)["vlmcap"]["config"]))
    videos = sorted((Path(saved.data.root) / "test" / "videos").glob("*.mp4"))
    captions = predictions(tmp_path / "run")
    assert vlmcap.load(checkpoint).caption(videos) == captions
    unpooled = saved_config(
        read_checkpoint(checkpoint)["vlmcap"]["config"],
        {"cache.pooled": False, "cache.enabled": False, "paths.output_dir": str(tmp_path / "scores")},
    )
    evaluate(unpooled, checkpoint)
    rows = [
        json.loads(line)
        for line in (tmp_path / "scores" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["prediction"] for row in rows] == captions
    no_encoder(monkeypatch)
    scores = evaluate(
        to_config(
            from_plain(read_checkpoint(checkpoint)["vlmcap"]["config"], {"paths.output_dir": str(tmp_path / "again")})
        ),
        checkpoint,
    )
    assert "test/cider" in scores, "evaluation reads the cache, and loads no encoder"


def test_the_encoder_is_gone_before_the_language_model_comes_and_never_comes_again(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive: list[int] = []
    load_llm = model_module.load_llm

    def spy(*arguments: Any, **options: Any) -> Any:
        encoders = [thing for thing in gc.get_objects() if isinstance(thing, VisionEncoder)]
        alive.append(sum(not next(encoder.parameters()).is_meta for encoder in encoders))
        return load_llm(*arguments, **options)

    gc.collect()
    before = sum(
        isinstance(thing, VisionEncoder) and not next(thing.parameters()).is_meta for thing in gc.get_objects()
    )
    monkeypatch.setattr(model_module, "load_llm", spy)
    config = tiny_config(tmp_path, f"paths.cache_dir={own_cache(tiny_config, tmp_path)}")
    first = assembled(config)
    assert "encoding the train split: 24 clips, " in capsys.readouterr().out
    assert alive == [before]
    assert first.captioner.encoder is None
    assert first.features is not None
    assert len(first.features.store) == 40
    no_encoder(monkeypatch)
    second = assembled(config)
    assert "encoding" not in capsys.readouterr().out
    assert first.num_encoder_parameters == second.num_encoder_parameters > 0
    for name, tensor in second.captioner.state_dict().items():
        assert torch.equal(tensor, first.captioner.state_dict()[name]), (
            "the same start, whether features were missing or not"
        )


def own_cache(tiny_config: MakeConfig, folder: Path) -> Path:
    """A cache folder with the session's demo and base parts, and no features."""
    config = prepare(tiny_config(folder))
    source, target = Path(config.paths.cache_dir), folder / "cache"
    shutil.copytree(source / "demo", target / "demo")
    return target


def test_what_is_there_is_not_encoded_again(
    real_path: list[str], aihub_root: Path, tmp_path: Path, capsys: Any
) -> None:
    root = Path(shutil.copytree(aihub_root, tmp_path / "data"))
    overrides = [*real_path, f"data.root={root}", "cache.enabled=true"]
    assembled(compose(overrides))
    capsys.readouterr()
    for part, ending in (("videos", "mp4"), ("labels", "json")):
        (root / "train" / part / f"train2.{ending}").rename(root / "train" / part / f"renamed.{ending}")
    (root / "val" / "videos" / "val0.mp4").unlink()
    shutil.copy(root / "train" / "videos" / "train0.mp4", root / "val" / "videos" / "val0.mp4")
    assembled(compose(overrides))
    assert "encoding" not in capsys.readouterr().out, (
        "clips are known by their content, in whichever split and under whichever name"
    )
    with (root / "val" / "videos" / "val1.mp4").open("ab") as file:
        file.write(b"\0" * 16)
    assembled(compose(overrides))
    assert "encoding the val split: 1 clips, " in capsys.readouterr().out


def test_an_interrupted_filling_goes_on(
    real_path: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, calls = VisionEncoder.forward, 0

    def interrupted(self: VisionEncoder, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(VisionEncoder, "forward", interrupted)
    monkeypatch.setattr(features_module, "FRAMES_PER_PASS", 4)  # two clips
    with pytest.raises(KeyboardInterrupt):
        assembled(compose([*real_path, "cache.enabled=true"]))
    assert "encoding the train split: 6 clips, " in capsys.readouterr().out
    assembled(compose([*real_path, "cache.enabled=true"]))
    assert "encoding the train split: 2 clips, " in capsys.readouterr().out


def test_other_stores_go_when_there_is_no_room(real_path: list[str], tmp_path: Path) -> None:
    first = assembled(compose([*real_path, "cache.enabled=true"]))
    assert first.features is not None
    used = sum(file.stat().st_size for file in first.features.store.folder.rglob("*"))
    shutil.rmtree(first.features.store.folder / ".users")  # as if the process that has it open had ended
    limit = 1.5 * used / 2**30
    assembled(compose([*real_path, "cache.enabled=true", "cache.dtype=bfloat16", f"cache.max_gib={limit}"]))
    left = sum(file.stat().st_size for file in (tmp_path / "cache" / "features").rglob("*") if file.is_file())
    assert left <= limit * 2**30


@pytest.mark.parametrize(
    "kind", thinned(["qwen3_vl", "qwen2_5_vl", "llava_next_video"], lambda kind: kind == "qwen3_vl")
)
def test_whole_models_too(
    kind: str,
    qwen_folders: dict[str, Path],
    llava_folder: Path,
    aihub_root: Path,
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = [
        f"model={kind}_{'8b' if kind == 'qwen3_vl' else '7b'}",
        f"model.checkpoint={qwen_folders.get(kind, llava_folder)}",
        "hardware=cpu",
        "data=aihub",
        f"data.root={aihub_root}",
        "data.num_frames=2",
        "data.batch_size=3",
        "data.eval_batch_size=3",
        "data.num_workers=0",
        "tuning.align_epochs=0",
        "tuning.epochs=1",
        "llm.max_caption_tokens=48",
        "llm.max_new_tokens=4",
        "trainer.log_every_n_steps=1",
        "evaluation.every_n_epochs=9",
        f"paths.cache_dir={tmp_path / 'cache'}",
        *([] if kind == "llava_next_video" else ["encoder.max_patches=16"]),
    ]
    decoded, cached = (
        fit(make_run, compose([*overrides, *cache, f"paths.output_dir={tmp_path / cache[0]}"]))
        for cache in (["cache.enabled=false"], CACHED)
    )
    assert len(cached) == 2
    assert cached == pytest.approx(decoded, rel=1e-5)
    no_encoder(monkeypatch)
    assembly = assembled(compose([*overrides, *CACHED, f"paths.output_dir={tmp_path / 'third'}"]))
    assert assembly.captioner.encoder is None


def test_a_tower_with_and_without_its_final_norm_has_two_stores(frames_folder: Callable[[str], Path]) -> None:
    """Gemma 3 reads SigLIP after its final norm, `encoder=custom` in front of it."""
    folder = frames_folder("gemma3")
    lengths = ["hardware=cpu", "data.num_frames=8", "llm.max_caption_tokens=48", "llm.max_new_tokens=4"]
    whole = ["model=internvl3_1b", f"model.checkpoint={folder}"]
    tower = ["encoder=custom", f"encoder.checkpoint={folder}", "llm=qwen3_4b", f"llm.checkpoint={folder}"]
    plans = [model_module.describe_model(compose([*lengths, *chosen])).feature_plan for chosen in (whole, tower)]
    recipes = [features_module.recipe_of(plan) for plan in plans]
    assert recipes[0].encoder == recipes[1].encoder
    assert recipes[0].key != recipes[1].key


def test_clips_of_fewer_frames_keep_them(real_path: list[str], make_run: MakeRun, tmp_path: Path) -> None:
    overrides = [*real_path, "data.num_frames=8", "data.variable_frames=true", *SHORT]
    decoded, cached = (
        fit(make_run, compose([*overrides, *cache, f"paths.output_dir={tmp_path / cache[0]}"]))
        for cache in (["cache.enabled=false"], CACHED)
    )
    assert cached == pytest.approx(decoded, rel=1e-6)
    assembly = assembled(compose([*overrides, *CACHED]))
    assert assembly.features is not None
    clips = assembly.features.clips["train"]
    grids, times_s = zip(*assembly.features.layouts(clips), strict=True)
    assert grids == ((4, 2, 2),) * 6, "the clips have four frames"
    assert all(len(clip_times) == 4 for clip_times in times_s)


@pytest.mark.parametrize("batching", thinned(["by_length", "packed"], lambda batching: batching == "packed"))
def test_lengths_are_known_from_the_features(
    batching: str, real_path: list[str], make_run: MakeRun, tmp_path: Path
) -> None:
    unread = ("data.batch_size=",)
    overrides = [*(one for one in real_path if not one.startswith(unread)), f"data.batching={batching}", *SHORT]
    overrides.append("data.max_tokens_per_batch=400")
    decoded, cached = (
        fit(make_run, compose([*overrides, *cache, f"paths.output_dir={tmp_path / cache[0]}"]))
        for cache in (["cache.enabled=false"], CACHED)
    )
    assert cached == pytest.approx(decoded, rel=1e-6)
