"""An exported folder is the fine-tuned model: the same logits, the same captions, in the stock classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.training.checkpoints.untrained import write_checkpoint
from vlmcap.cli import main
from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.models.llm import merge as merging
from vlmcap.training.checkpoints import export as exporting
from vlmcap.training.checkpoints.export import export
from vlmcap.training.checkpoints.load import load_captioner

Checkpoint = tuple[Path, Any]


@pytest.fixture
def make(real_path: list[str], tmp_path: Path) -> Callable[..., Checkpoint]:
    """A function from overrides to a checkpoint file and the captioner that it holds."""

    def made(*overrides: str) -> Checkpoint:
        path = tmp_path / "run" / "checkpoints" / "best.ckpt"
        return path, write_checkpoint(compose([*real_path, *overrides]), path)

    return made


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    embeddings = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    result: Tensor = model(inputs_embeds=embeddings).logits
    return result.float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "moe", "moe_experts", "tied"])
def test_logits_are_those_of_the_adapted_model(
    make: Callable[..., Checkpoint], kind: str, moe_folder: Path, llm_folder: Path, tmp_path: Path
) -> None:
    overrides = {
        "lora": [],
        "dora": ["tuning.lora.use_dora=true"],
        "moe": [f"llm.checkpoint={moe_folder}"],
        "moe_experts": [f"llm.checkpoint={moe_folder}", "tuning.lora.use_experts=true"],
        "tied": [f"llm.checkpoint={tied(llm_folder, tmp_path)}"],
    }[kind]
    path, captioner = make(*overrides)
    expected = logits(captioner.llm)
    with captioner.llm.disable_adapter():
        assert distance(logits(captioner.llm), expected) > 0.1  # or the test would show nothing
    found = export(path, tmp_path / "out")
    assert found.dtype == "float32"
    model = stock(tmp_path / "out")
    assert distance(logits(model), expected) < 1e-5
    assert (kind == "tied") == (model.lm_head.weight is model.model.embed_tokens.weight)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    # What transformers 4 reads, beside what 5 does.
    assert values["rope_theta"] == (50.0 if kind == "tied" else 10000.0)
    assert values.get("rope_scaling") == ({"rope_type": "linear", "factor": 2.0} if kind == "tied" else None)
    assert (kind == "tied") == ("lm_head.weight" not in weights_of(tmp_path / "out"))


def tied(folder: Path, tmp_path: Path) -> Path:
    """The same model with its head in its embeddings."""
    from transformers import AutoConfig, Qwen3ForCausalLM

    copy = shutil.copytree(
        folder, tmp_path / "tied-base", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}
    torch.manual_seed(5)
    Qwen3ForCausalLM(config).save_pretrained(copy)
    return copy


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_captions_are_those_of_the_checkpoint(
    make: Callable[..., Checkpoint], aihub_root: Path, tmp_path: Path
) -> None:
    path, _ = make("llm.max_new_tokens=12")
    videos = sorted((aihub_root / "train" / "videos").glob("*.mp4"))
    expected = load_captioner(path).caption(videos)
    assert len(set(expected)) > 1
    export(path, tmp_path / "out")
    assert load_captioner(tmp_path / "out").caption(videos) == expected
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    output = tmp_path / "captions.jsonl"
    main(["caption", *map(str, videos), "--checkpoint", str(moved), "--output", str(output)])
    assert [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()] == expected


@pytest.mark.parametrize("experts", [False, True])
def test_a_run_in_four_bits_is_merged_onto_the_full_base(
    make: Callable[..., Checkpoint], moe_folder: Path, llm_folder: Path, experts: bool, tmp_path: Path
) -> None:
    """The base's own numbers and the adapters' effect, in bfloat16; not what 4 bits left of them."""
    base = moe_folder if experts else llm_folder
    more = ["tuning.lora.use_experts=true"] if experts else []
    path, captioner = make("llm.quantization=4bit", "hardware.precision=bf16", f"llm.checkpoint={base}", *more)
    found = export(path, tmp_path / "out")
    assert found.dtype == "bfloat16"
    merged, plain = weights_of(tmp_path / "out"), weights_of(base)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert merged.keys() == plain.keys()
    adapters = dict(captioner.llm.named_parameters())
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"
    lora = captioner.llm.peft_config["default"]
    delta = adapters[stem.format("B")] @ adapters[stem.format("A")] * lora.lora_alpha / lora.r
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        merged[name].float(), plain[name] + delta, rtol=2**-7, atol=2**-7 * float(plain[name].abs().max())
    )
    assert distance(merged[name].float() - plain[name], delta.detach()) < 0.02
    norm = "model.norm.weight"
    assert torch.equal(merged[norm], plain[norm].bfloat16())
    # 4 bits move the logits far more than 16 do: the bound of bfloat16 is 5 %.
    difference = json.loads((tmp_path / "out" / "vlmcap" / "origin.json").read_text())["logit_difference"]
    assert 0 < difference < 0.05


def test_bfloat16_stays_within_its_bound(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    path, captioner = make()
    expected = logits(captioner.llm)
    assert export(path, tmp_path / "out", dtype="bfloat16").dtype == "bfloat16"
    assert distance(logits(stock(tmp_path / "out", torch.bfloat16), torch.bfloat16), expected) < 0.05


@pytest.mark.parametrize("tuning", ["full", "projector_only"])
def test_without_adapters(real_path: list[str], tuning: str, llm_folder: Path, tmp_path: Path) -> None:
    config = compose([*(o for o in real_path if "stages.tune" not in o), f"tuning={tuning}"])
    path = tmp_path / "best.ckpt"
    write_checkpoint(config, path)
    content = torch.load(path, weights_only=True)
    if tuning == "full":
        for name, tensor in content["state_dict"].items():
            if name.endswith("q_proj.weight"):
                tensor.mul_(1.5)
        torch.save(content, path)
    export(path, tmp_path / "out")
    merged, plain = weights_of(tmp_path / "out"), weights_of(llm_folder)
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor, plain[name] * (1.5 if tuning == "full" and name.endswith("q_proj.weight") else 1.0)
        )


def test_the_folder_holds_all_that_belongs_to_it(
    make: Callable[..., Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, captioner = make(
        "llm.chat_template='{% for m in messages %}{{ m.content }}{% endfor %} A:'", "evaluation.repetition_penalty=1.2"
    )
    main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "deep" / "out"), "llm.max_new_tokens=9"])
    shown = capsys.readouterr()
    folder = tmp_path / "deep" / "out"
    assert "Qwen3ForCausalLM" in shown.out
    assert str(folder) in shown.out
    assert "merging layers" in shown.err
    assert "writing" in shown.err
    from transformers import AutoTokenizer, GenerationConfig

    assert (
        AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "가"}], tokenize=False)
        == "가 A:"
    )
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.do_sample, settings.max_new_tokens) == (captioner.prompt.stop_ids, False, 9)
    assert settings.repetition_penalty == 1.2
    # vLLM takes every safetensors file beside config.json for weights of the model.
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert {file.name for file in (folder / "vlmcap").iterdir()} == {
        "config.yaml",
        "origin.json",
        "projector.safetensors",
    }
    assert [file.name for file in folder.parent.iterdir()] == ["out"]


def test_large_models_come_in_shards(
    make: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, captioner = make()
    monkeypatch.setattr(merging, "SHARD_SIZE", "100KB")
    export(path, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert distance(logits(stock(tmp_path / "out")), logits(captioner.llm)) < 1e-5


def test_a_tuned_encoder_goes_along(make: Callable[..., Checkpoint], aihub_root: Path, tmp_path: Path) -> None:
    path, _ = make("tuning.encoder=lora", "cache.enabled=false")
    videos = sorted((aihub_root / "test" / "videos").glob("*.mp4"))
    expected = load_captioner(path).caption(videos)
    export(path, tmp_path / "out")
    with safe_open(tmp_path / "out" / "vlmcap" / "encoder.safetensors", framework="pt") as saved:
        assert all("lora_" in name for name in saved.keys())  # noqa: SIM118 - no mapping
    assert load_captioner(tmp_path / "out").caption(videos) == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_touched(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    path, _ = make()
    used = tmp_path / "used"
    used.mkdir()
    export(path, used)  # empty, so it will do
    before = {file: file.stat().st_mtime_ns for file in used.rglob("*")}
    with pytest.raises(UserError, match=r"used is not empty; name a new folder"):
        export(path, used)
    assert before == {file: file.stat().st_mtime_ns for file in used.rglob("*")}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export(path, tmp_path / "file")
    with pytest.raises(UserError, match="is an exported folder already"):
        export(used, tmp_path / "again")


def test_mistakes_are_told_before_the_base_is_read(
    make: Callable[..., Checkpoint], tmp_path: Path, moe_folder: Path
) -> None:
    path, _ = make()
    with pytest.raises(UserError, match="--dtype int8 is unknown; choose one of bfloat16, float16, float32"):
        export(path, tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="--device gpu is not a device"):
        export(path, tmp_path / "out", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA device"):
            export(path, tmp_path / "out", device="cuda:0")
    with pytest.raises(UserError, match=r"does not exist"):
        export(tmp_path / "no.ckpt", tmp_path / "out")
    with pytest.raises(UserError, match=r"was trained on the llm .*set llm\.checkpoint"):
        export(path, tmp_path / "out", overrides={"llm.checkpoint": str(moe_folder)})
    with pytest.raises(UserError, match=r"llm\.chekpoint"):
        export(path, tmp_path / "out", overrides={"llm.chekpoint": "x"})
    assert not (tmp_path / "out").exists()


def test_a_moved_base_is_found_by_an_override(
    make: Callable[..., Checkpoint], llm_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(llm_folder, tmp_path / "old")
    path, captioner = make(f"llm.checkpoint={copy}")
    copy.rename(tmp_path / "new")
    with pytest.raises(UserError, match=r"llm\.checkpoint"):
        export(path, tmp_path / "out")
    main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out"), f"llm.checkpoint={tmp_path / 'new'}"])
    assert distance(logits(stock(tmp_path / "out")), logits(captioner.llm)) < 1e-5


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_nothing(
    make: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path, _ = make()

    def stop(*_: Any) -> None:
        raise error("no space left on device")

    monkeypatch.setattr(exporting, "write_components", stop)  # the weights are written by then
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out")])
    assert ended.value.code == (130 if error is KeyboardInterrupt else 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == before
