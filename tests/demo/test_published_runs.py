"""Published weights on real video: first loss, learning by heart, export, 4 bits, resuming and the native engine.

Each test records what it measured; `python -m tools.verified_page` makes docs/reference/verified.md of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.assembling import assembled
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.resolving import resolve
from vlmcap.compose import compose
from vlmcap.config import Config, EvaluationConfig, Split
from vlmcap.demo.published import SCENES, IndexUnreachableError, published
from vlmcap.models.decoding.engine import greedy_ids
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.training.checkpoints.export import export
from vlmcap.training.checkpoints.load import load_captioner, read_checkpoint
from vlmcap.training.objects import Run, build_run
from vlmcap.training.run import train

pytestmark = pytest.mark.weights

# Before a fixture moves the cache: downloads are kept between sessions.
CACHE = Path(os.environ.get("VLMCAP_CACHE_DIR", Path.home() / ".cache" / "vlmcap"))
EXPERIMENT = "python train.py experiment=published_small"
LANGUAGES = {
    "korean": (),
    "english": ("data.caption_key=caption_en",),
}
QUESTIONS = (
    "What is the capital of France?",
    "Name three colors.",
    "Write a short poem about the sea.",
    "How do birds fly?",
    "What is 12 plus 30?",
    "Explain photosynthesis in one sentence.",
    "Who wrote Hamlet?",
    "List the days of the week.",
    "What does a bicycle have two of?",
    "Describe a rainy street.",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Give me a recipe for tea.",
    "What is the opposite of hot?",
    "Tell me a joke.",
    "영상을 설명해 주세요.",
)
Record = Callable[..., None]


@pytest.fixture(scope="module", autouse=True)
def folders() -> dict[str, Path]:
    """The published weights and clips, in the cache of the machine."""
    parent = CACHE / "published"
    try:
        return {name: published(parent, name) for name in ("dinov2_small", "smollm2_135m", "clips")}
    except IndexUnreachableError as error:
        pytest.skip(str(error))


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Iterator[Record]:
    """A function that records a row of the page: its title, a command, and what was measured."""
    started = time.perf_counter()

    def write(title: str, command: str, *found: str, captions: list[list[str]] | None = None) -> None:
        seconds = round(time.perf_counter() - started)
        row = {"title": title, "command": command, "found": list(found), "seconds": seconds, "captions": captions or []}
        record_property(f"verified:{title}", json.dumps(row, ensure_ascii=False))

    return write


def configure(folder: Path, *overrides: str) -> Config:
    return compose(["experiment=published_small", f"paths.output_dir={folder}", f"paths.cache_dir={CACHE}", *overrides])


def build(config: Config) -> Run:
    """The objects of a run before its first step, as `train` builds them."""
    L.seed_everything(config.seed, verbose=False)
    read = load_splits(config, [Split.train])["train"]
    clips = {"train": read, "val": read}
    config = resolve(config, clips)
    return build_run(config, assembled(config, clips), clips, Path(config.paths.output_dir))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses_of(folder: Path) -> list[float]:
    return [row["train/loss"] for row in lines_of(folder / "metrics.jsonl") if "train/loss" in row]


# --- the first loss, by other means -----------------------------------------------------------------------------------


def plain_loss(folders: dict[str, Path], projector: dict[str, Tensor], question: str) -> float:
    """Mean negative log-likelihood of all captions by PyAV, Pillow, NumPy and transformers' own classes alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

    encoder = Dinov2Model.from_pretrained(folders["dinov2_small"]).eval()
    llm = AutoModelForCausalLM.from_pretrained(folders["smollm2_135m"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["smollm2_135m"])
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"<VIDEO>\n{question}"}], tokenize=False, add_generation_prompt=True
    )
    before, after = (tokenizer(text)["input_ids"] for text in template.split("<VIDEO>"))
    total, count = 0.0, 0
    for row in lines_of(folders["clips"] / "train.jsonl"):
        hidden = encoder(pixels_of(folders["clips"] / row["video"])).last_hidden_state[:, 1:]  # (4, 256, 384)
        # (4, 16 * 16, 384) -> (4, 4, 4, 4, 4, 384) -> (4, 4 * 4, 384), the mean of each 4 x 4 patches
        pooled = hidden.view(4, 4, 4, 4, 4, 384).mean((2, 4)).view(4, 16, 384)
        tokens = pooled.transpose(0, 1).reshape(16, 4 * 384)  # the four frames of each place side by side
        tokens = torch.nn.functional.layer_norm(
            tokens, (4 * 384,), projector["before.norm.weight"], projector["before.norm.bias"]
        )
        tokens = tokens + projector["before.position.frame"][0] + projector["before.position.patch"][0]
        for layer in (0, 2):
            prefix = f"projection.layers.{layer}"
            tokens = torch.nn.functional.linear(tokens, projector[f"{prefix}.weight"], projector[f"{prefix}.bias"])
            tokens = torch.nn.functional.gelu(tokens) if layer == 0 else tokens
        answer = [*tokenizer(row["caption_en"])["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
        words = llm.get_input_embeddings()(torch.tensor([*before, *after, *answer]))
        embeddings = torch.cat([words[: len(before)], tokens, words[len(before) :]])[None]
        logits = llm(inputs_embeds=embeddings).logits[0, -len(answer) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def pixels_of(video: Path) -> Tensor:
    """Four frames at the centres of four equal parts of a clip, as DINOv2 takes them, (4, 3, 224, 224)."""
    import av
    import numpy as np

    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = np.stack([frames[int(len(frames) * (2 * part + 1) / 8)] for part in range(4)])
    pictures = torch.from_numpy(chosen).permute(0, 3, 1, 2)  # (4, H, W, 3) -> (4, 3, H, W)
    resized = torch.nn.functional.interpolate(pictures, (224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (resized.float() / 255 - mean) / std


def test_the_first_loss_is_that_of_a_computation_without_this_package(
    folders: dict[str, Path], tmp_path: Path, record: Record
) -> None:
    whole = ("encoder.is_cached=false", "data.num_workers=0", "trainer.max_steps=1")
    run = build(configure(tmp_path / "run", *LANGUAGES["english"], *whole))
    initial = {name: tensor.clone() for name, tensor in run.module.captioner.projector.state_dict().items()}
    with torch.no_grad():
        expected = plain_loss(folders, initial, "Describe the video.")
    run.trainer.fit(run.module, datamodule=run.data)
    (found,) = losses_of(tmp_path / "run")
    assert found == pytest.approx(expected, abs=1e-5)
    record(
        "First loss, all eight clips",
        'make test-weights ARGS="-k first_loss"',
        f"{found:.7f}; by PyAV and transformers' classes alone {expected:.7f}",
    )


# --- learning by heart ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a language to the folder of the whole experiment, which runs once."""
    folders: dict[str, Path] = {}

    def run(language: str) -> Path:
        if language not in folders:
            folders[language] = tmp_path_factory.mktemp(language) / "run"
            train(configure(folders[language], *LANGUAGES[language]))
        return folders[language]

    return run


@pytest.mark.parametrize("language", LANGUAGES)
def test_eight_clips_are_learned_by_heart(
    trained: Callable[[str], Path], folders: dict[str, Path], language: str, tmp_path: Path, record: Record
) -> None:
    videos = [folders["clips"] / f"{scene.name}.mp4" for scene in SCENES]
    references = [scene.korean if language == "korean" else scene.english for scene in SCENES]
    folder = trained(language)
    before = untrained_captions(configure(tmp_path, *LANGUAGES[language]))
    after = load_captioner(folder / "checkpoints" / "best.ckpt").caption(videos)
    assert after == references
    assert all(caption != reference for caption, reference in zip(before, references, strict=True))
    losses, summary = losses_of(folder), json.loads((folder / "summary.json").read_text())
    assert losses[-1] < 0.02
    scores = summary["scores"]
    assert scores["val/swapped/cider"] < 0.1 * scores["val/cider"]
    record(
        f"Eight captions by heart, {language}",
        " ".join([EXPERIMENT, *LANGUAGES[language]]),
        f"loss {losses[0]:.3f} → {losses[-1]:.4f} in {summary['steps']} steps; {len(after)} of {len(after)} captions "
        "are the references, character for character",
        f"CIDEr {scores['val/cider']:.3f}, with videos swapped {scores['val/swapped/cider']:.3f}",
        captions=[list(row) for row in zip(before, after, strict=True)],
    )


def untrained_captions(config: Config) -> list[str]:
    """Captions of the published parts with a projector of random weights, in the order of the scenes."""
    run = build(config)
    batches = list(run.data.prompt_loader("val"))
    written = [caption for batch in batches for caption in run.module.captioner.eval().generate(batch)]
    named = dict(zip((clip.id for batch in batches for clip in batch.clips), written, strict=True))
    return [named[scene.name] for scene in SCENES]


# --- what is done with the result -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_export_loads_in_plain_transformers(trained: Callable[[str], Path], tmp_path: Path, record: Record) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = trained("english") / "checkpoints" / "best.ckpt"
    captioner: Any = load_captioner(checkpoint)
    export(checkpoint, tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    ids = captioner.prompt.tokenizer(SCENES[0].english, return_tensors="pt")["input_ids"]
    ours, theirs = captioner.llm(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    with captioner.llm.disable_adapter():
        assert float((captioner.llm(input_ids=ids).logits - ours).abs().max()) > 1  # or the test would show nothing
    error = float((ours - theirs).norm() / ours.norm())
    assert error < 1e-5
    record(
        "Export, loaded by `LlamaForCausalLM`",
        "vlmcap export outputs/RUN/checkpoints/best.ckpt --output exported",
        f"logits differ by {error:.0e} of their norm",
    )


def test_four_bits_train(folders: dict[str, Path], tmp_path: Path, record: Record) -> None:
    four_bits = (
        "llm.quantization=4bit",
        "data.max_clips=1",
        "monitor=val/loss",
        "tuning.epochs=3",
        "evaluation.every_n_epochs=3",
    )
    train(configure(tmp_path / "run", *LANGUAGES["english"], *four_bits))
    losses = losses_of(tmp_path / "run")
    captioner: Any = load_captioner(tmp_path / "run" / "checkpoints" / "last.ckpt")
    from bitsandbytes.nn import Linear4bit

    assert sum(isinstance(module, Linear4bit) for module in captioner.llm.modules()) == 30 * 7
    assert losses[-1] < losses[0]
    record(
        "4 bits: load, three steps, load again",
        f"{EXPERIMENT} llm.quantization=4bit data.max_clips=1 monitor=val/loss tuning.epochs=3",
        f"loss {losses[0]:.3f} → {losses[-1]:.3f}; 210 linear layers are in 4 bits",
    )


def test_a_resumed_run_is_the_straight_one(tmp_path: Path, record: Record) -> None:
    short = (
        *LANGUAGES["english"],
        "data.max_clips=2",
        "data.batch_size=1",
        "tuning.epochs=2",
        "evaluation.every_n_epochs=2",
    )
    train(configure(tmp_path / "straight", *short))
    train(configure(tmp_path / "run", *short, "trainer.max_steps=2"))
    train(configure(tmp_path / "run", *short, "checkpoint=last"))
    straight, resumed = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("straight", "run")
    )
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    record(
        "Stopped after two of four steps, resumed",
        f"{EXPERIMENT} paths.output_dir=outputs/RUN checkpoint=last",
        f"{len(straight)} trained tensors are bit-identical to those of a straight run",
    )


@torch.no_grad()
def test_the_native_engine_writes_what_generate_writes(folders: dict[str, Path], record: Record) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(folders["smollm2_135m"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["smollm2_135m"])
    render = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompts = [render([{"role": "user", "content": question}])["input_ids"] for question in QUESTIONS]
    settings, end = GenerationSettings(24, EvaluationConfig()), tokenizer.eos_token_id
    embeddings = [llm.get_input_embeddings()(ids)[0] for ids in prompts]
    found = greedy_ids(llm, embeddings, settings, (end,), 5)
    expected = [llm.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist() for ids in prompts]
    assert found == expected
    assert len({tuple(ids) for ids in found}) == len(QUESTIONS)
    assert "Paris" in tokenizer.decode(found[0])  # the published model, not just any
    record(
        "Native engine in float32, 5 slots, against `generate`",
        'make test-weights ARGS="-k native_engine"',
        f"{len(found)} of {len(found)} answers have the same ids; the first is “{tokenizer.decode(found[0][:-1])}”",
    )
