"""An exported whole model is the stock class's, with projector and adapters in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints.pretrained import CASES
from tests.thinned import thinned
from tests.training.checkpoints.untrained import write_checkpoint
from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.training.checkpoints.export import describe_export, export
from vlmcap.training.checkpoints.load import load_captioner

# Tiny models by the file that has their settings.
NAMES = {
    "qwen2_vl": "qwen2_vl_7b",
    "qwen2_5_vl": "qwen2_5_vl_7b",
    "qwen3_vl": "qwen3_vl_8b",
    "qwen3_vl_moe": "qwen3_vl_30b_a3b",
    "qwen3_5": "qwen3_5_9b",
    "exaone4_5": "exaone4_5_33b",
    "hyperclovax_vision_v2": "exaone4_5_33b",
    "llava_next_video": "llava_next_video_7b",
    "internvl": "internvl3_1b",
    "varco_vision_2": "internvl3_1b",
    "gemma3": "internvl3_1b",
    "smolvlm": "internvl3_1b",
}


@pytest.mark.parametrize(
    "kind",
    thinned(list(NAMES), lambda kind: kind in ("qwen3_vl", "llava_next_video", "internvl", "exaone4_5", "gemma3")),
)
def test_a_whole_model(
    kind: str,
    qwen_folders: dict[str, Path],
    llava_folder: Path,
    frames_folder: Callable[[str], Path],
    aihub_root: Path,
    tmp_path: Path,
) -> None:
    """The stock class loads it, and our captions from it are those of the checkpoint."""
    import transformers

    base = frames_folder(kind) if kind in CASES else (qwen_folders | {"llava_next_video": llava_folder})[kind]
    overrides = [
        f"model={NAMES[kind]}",
        f"model.checkpoint={base}",
        "hardware=cpu",
        "data=aihub",
        f"data.root={aihub_root}",
        "data.num_frames=2",
        "data.num_workers=0",
        "llm.max_caption_tokens=96",
        "llm.max_new_tokens=6",
        "hardware.frame_stack=1",
        f"paths.cache_dir={tmp_path / 'cache'}",
        f"paths.output_dir={tmp_path / 'run'}",
    ]
    overrides += ["encoder.max_patches=16"] if kind in qwen_folders else []
    if kind == "llava_next_video":
        overrides.append("llm.chat_template='{% for m in messages %}{{ m.content }}{% endfor %}'")
    path = tmp_path / "best.ckpt"
    write_checkpoint(compose(overrides), path)
    videos = sorted((aihub_root / "test" / "videos").glob("*.mp4"))
    expected = load_captioner(path).caption(videos)
    found = export(path, tmp_path / "out")
    model_class = getattr(transformers, found.class_name)
    model, loading = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model_class is getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    stock_keys = model_class.from_pretrained(base).state_dict().keys()
    assert model.state_dict().keys() == stock_keys
    state = torch.load(path, weights_only=True)["state_dict"]
    projector = next(t for n, t in state.items() if n.startswith("captioner.projector.") and t.ndim == 2)
    assert any(t.shape == projector.shape and torch.equal(t, projector) for t in model.state_dict().values())
    assert load_captioner(tmp_path / "out").caption(videos) == expected
    assert found.class_name in describe_export(found)


def test_a_trained_encoder_is_refused(llava_folder: Path, aihub_root: Path, tmp_path: Path) -> None:
    """The whole model's class has no place for the adapters of its tower."""
    base = [
        f"model.checkpoint={llava_folder}",
        "data=aihub",
        f"data.root={aihub_root}",
        "data.num_frames=2",
        "hardware=cpu",
    ]
    base += [
        "llm.chat_template='{% for m in messages %}{{ m.content }}{% endfor %}'",
        "llm.max_caption_tokens=96",
        "llm.max_new_tokens=6",
    ]
    config = compose(
        ["model=llava_next_video_7b", "tuning.encoder=lora", *base, f"paths.cache_dir={tmp_path / 'cache'}"]
    )
    write_checkpoint(config, tmp_path / "best.ckpt")
    with pytest.raises(
        UserError,
        match=r"trained with tuning\.encoder=lora, and the trained encoder of a pretrained VLM cannot be exported",
    ):
        export(tmp_path / "best.ckpt", tmp_path / "out")
