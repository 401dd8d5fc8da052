"""What holds for every test: no network, no uploads, one thread a worker."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.thinned import is_left_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmcap.config import Config
    from vlmcap.training.objects import Run

# Before anything imports torch, transformers or wandb: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # `HF_HUB_OFFLINE=0 pytest -m network` may override
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # PyTorch looks once a process whether products may be deterministic
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"

# Tiny checkpoints in true layouts, for tests of more than one folder.
pytest_plugins = [
    "tests.checkpoints.encoders",
    "tests.checkpoints.hub",
    "tests.checkpoints.moe",
    "tests.checkpoints.pretrained",
    "tests.sweeping.program",
]


gc.disable()  # until the test modules are imported, which define much and leave nothing to collect


def pytest_collection_finish() -> None:
    """Modules stay for good, so the collector need not search them after each of many tests."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Random weights are the same whichever tests ran before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests with many parameters that are alike, only some belong to the fast ones."""
    counts: Counter[str] = Counter()
    for item in items:
        name, bracket, _ = item.nodeid.partition("[")
        if bracket and item.get_closest_marker("slow") is None:
            if is_left_out(name, counts[name]):
                item.add_marker(pytest.mark.slow)
            counts[name] += 1


@pytest.fixture(scope="module", autouse=True)
def collected_once() -> None:
    """What earlier modules imported and keep is searched no more either."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra composes each choice of files once per worker."""
    from tests.composing import Remembered
    from vlmcap import compose as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "register_schemas", functools.cache(module.register_schemas))
        patch.setattr(module, "compose_node", Remembered(module.compose_node))
        yield


# --- a whole tiny run -------------------------------------------------------------------------------------------------

TINY_RUN = (
    "data.demo.num_train=24",
    "monitor=val/cider",
    "evaluation.every_n_epochs=1",
    "data.demo.num_val=8",
    "data.demo.num_test=8",
    "data.num_workers=0",
    "data.num_frames=2",
    "data.batch_size=3",
    "data.eval_batch_size=8",
    "tuning.align_epochs=1",
    "tuning.epochs=2",
    "cache.enabled=true",
    "projector.reducer=pool",
    "projector.pool_size=4",
    "projector.frame_stack=1",
    "llm.max_caption_tokens=16",
    "llm.max_new_tokens=6",
    "trainer.accumulate_grad_batches=2",
    "trainer.log_every_n_steps=2",
)


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of the session: demo clips, tiny base parts and features are made once."""
    folder = tmp_path_factory.mktemp("vlmcap-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMCAP_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_config(tiny_cache: Path) -> Callable[..., Config]:
    """A function from a run folder and overrides to a configuration.

    24 clips, 4 steps of 2 micro-batches of 3 clips an epoch, 2 epochs.
    """
    from vlmcap.compose import compose

    def make(folder: Path, *overrides: str) -> Config:
        is_two_stage = not any(override.startswith("tuning=") for override in overrides)
        run = [one for one in TINY_RUN if is_two_stage or not one.startswith("tuning.")]
        epochs = [] if is_two_stage else ["tuning.epochs=1"]
        return compose([*run, *epochs, f"paths.output_dir={folder}", f"paths.cache_dir={tiny_cache}", *overrides])

    return make


@pytest.fixture(scope="session")
def make_run() -> Callable[[Config], Run]:
    """Builds the objects of a run from a configuration, for `run.trainer.fit(run.module, datamodule=run.data)`."""
    import lightning as L

    from tests.assembling import assembled
    from vlmcap.assembly.clips import load_splits
    from vlmcap.config import Split
    from vlmcap.demo.prepare import prepare
    from vlmcap.training.objects import build_run

    def make(config: Config) -> Run:
        config = prepare(config)
        L.seed_everything(config.seed, verbose=False)
        clips = load_splits(config, list(Split))
        assembly = assembled(config, clips)
        return build_run(config, assembly, clips, Path(config.paths.output_dir))

    return make


@pytest.fixture(scope="session")
def straight_run(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole `train()`, with dropout in the adapters so that random states count."""
    from vlmcap.training.run import train

    folder = tmp_path_factory.mktemp("runs") / "straight"
    config = tiny_config(folder, "tuning.lora.dropout=0.1", "evaluation.swap_videos=true", "evaluation.swap_shifts=2")
    objective = train(config)
    (folder / "objective.json").write_text(json.dumps(objective))
    return folder


CAPTIONS = (
    "푸른 바다 위로 아침 해가 천천히 떠오른다. 작은 배 한 척이 왼쪽으로 지나간다.",
    "눈 내리는 밤의 궁궐이 화면에 펼쳐진다. 빨간 등불이 바람에 흔들린다.",
    "비가 오는 도심의 거리를 사람들이 우산을 쓰고 걷는다.",
    "'서울 2024'라고 쓰인 간판 아래로 노란 택시가 지나간다.",
    "맑은 가을 산에 단풍이 물들었다.",
    "강가의 갈대밭 위로 새 떼가 오른쪽으로 날아간다.",
)
# As Qwen3's: thinking is turned off by an empty thought in front of the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_processor(folder: Path, kind: str, **values: Any) -> None:
    """The preprocessor file as the hub's checkpoints have it."""
    import transformers

    getattr(transformers, f"{kind}ImageProcessor")(**values).save_pretrained(folder)


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SigLIP's vision tower with random weights: 28 x 28 pixels, 4 patches, width 32."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder)
    save_processor(folder, "Siglip", size={"height": 28, "width": 28}, resample=2)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's vision tower with random weights: 28 x 28 pixels, 4 patches and CLS, width 32."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(2)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    save_processor(folder, "CLIP", size={"shortest_edge": 28}, crop_size=28)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of a few Korean sentences with Qwen3's special tokens and a chat template like its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def llm_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with random weights, grouped-query attention, untied head and 512 positions."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,  # so that greedy captions depend on what comes before them
    )
    model = Qwen3ForCausalLM(config)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    # Qwen3's own settings sample; captions must not.
    model.generation_config = GenerationConfig(
        eos_token_id=stops, do_sample=True, temperature=0.6, top_k=20, top_p=0.95
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_aihub(root: Path, write_clip: Callable[[Path, NDArray[np.uint8]], object]) -> None:
    """Writes the AI Hub layout: 6 clips to train on, 3 to validate, 2 to test.

    Args:
        root: An empty folder.
        write_clip: Writes frames (4, 36, 48, 3) to a path.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        for part in ("videos", "labels"):
            (root / split / part).mkdir(parents=True)
        for index in range(count):
            colours = rng.integers(0, 255, (4, 1, 1, 3)) + rng.integers(-20, 20, (4, 36, 48, 3))
            write_clip(root / split / "videos" / f"{split}{index}.mp4", colours.clip(0, 255).astype(np.uint8))
            label = {"annotation": {"description_kr": CAPTIONS[index]}}
            (root / split / "labels" / f"{split}{index}.json").write_text(
                json.dumps(label, ensure_ascii=False), encoding="utf-8"
            )


@pytest.fixture(scope="session")
def aihub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AI Hub layout with real clips: 6 to train on, 3 to validate, 2 to test."""
    from vlmcap.data.decoding.video import write_video

    root = tmp_path_factory.mktemp("aihub")
    write_aihub(root, functools.partial(write_video, fps=4))
    return root


@pytest.fixture
def real_path(siglip_folder: Path, llm_folder: Path, aihub_root: Path, tmp_path: Path) -> list[str]:
    """Overrides that put the tiny checkpoints and clips under `encoder=siglip2 llm=qwen3_8b`.

    The run goes to `tmp_path / "run"`.
    """
    return [
        "encoder=siglip2",
        "llm=qwen3_8b",
        "hardware=cpu",
        "data=aihub",
        f"encoder.checkpoint={siglip_folder}",
        f"llm.checkpoint={llm_folder}",
        f"data.root={aihub_root}",
        "data.num_frames=2",
        "data.batch_size=2",
        "data.eval_batch_size=2",
        "data.num_workers=0",
        "projector.frame_stack=1",
        "projector.reducer=none",
        "projector.temporal=none",
        "llm.max_caption_tokens=96",
        "llm.max_new_tokens=6",
        "tuning.epochs=2",
        f"paths.output_dir={tmp_path / 'run'}",
        f"paths.cache_dir={tmp_path / 'cache'}",
    ]
