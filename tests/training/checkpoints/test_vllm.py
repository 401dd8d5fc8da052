"""`evaluation.engine=vllm`: a vLLM that runs the exported folder gives the own path's captions and scores."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_generation import build, collate, samples
from tests.training.checkpoints.untrained import write_checkpoint
from vlmcap.compose import compose
from vlmcap.config import Config, Engine
from vlmcap.errors import UserError
from vlmcap.models.vllm.captioner import VllmCaptioner
from vlmcap.training.checkpoints.export import export
from vlmcap.training.checkpoints.load import load_captioner
from vlmcap.training.run import evaluate, train


class FakeVllm(types.ModuleType):
    """What is called of vLLM, in its own names; captions come of transformers' model in the folder.

    Keeps what it was asked.
    """

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = importlib.util.spec_from_loader("vllm", None)
        self.started: list[dict[str, Any]] = []
        self.asked: list[tuple[list[Any], dict[str, Any]]] = []
        fake = self

        class SamplingParams:
            def __init__(self, **arguments: Any) -> None:
                self.arguments = arguments

        class LLM:
            def __init__(self, **arguments: Any) -> None:
                from transformers import AutoModelForCausalLM

                fake.started.append(arguments)
                self.model = AutoModelForCausalLM.from_pretrained(
                    arguments["model"], dtype=getattr(torch, arguments["dtype"])
                ).eval()

            def generate(
                self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, *, use_tqdm: bool
            ) -> list[Any]:
                arguments = sampling_params.arguments
                fake.asked.append(([prompt["prompt_embeds"] for prompt in prompts], arguments))
                return [self._one(prompt["prompt_embeds"], arguments) for prompt in prompts]

            @torch.no_grad()
            def _one(self, rows: torch.Tensor, arguments: dict[str, Any]) -> Any:
                assert arguments["temperature"] == 0
                ids: list[int] = []
                while len(ids) < arguments["max_tokens"] and (not ids or ids[-1] not in arguments["stop_token_ids"]):
                    words = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
                    inputs = torch.cat([rows.to(words.dtype), words])[None]
                    ids.append(int(self.model(inputs_embeds=inputs).logits[0, -1].argmax()))
                return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(ids))])

        self.LLM, self.SamplingParams = LLM, SamplingParams


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake


@pytest.fixture
def made(real_path: list[str], tmp_path: Path) -> tuple[Config, Path]:
    """A configuration and a checkpoint of it."""
    config = compose(
        [*real_path, "llm.max_new_tokens=10", "cache.enabled=true", "data.split=val", "data.eval_batch_size=3"]
    )
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    write_checkpoint(config, path)
    return config, path


def with_engine(config: Config, folder: Path, **settings: Any) -> Config:
    evaluation = dataclasses.replace(config.evaluation, engine=Engine.vllm, **settings)
    return dataclasses.replace(
        config, evaluation=evaluation, paths=dataclasses.replace(config.paths, output_dir=str(folder))
    )


def predictions(folder: Path) -> list[str]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_captions_and_scores_are_those_of_the_own_path(
    made: tuple[Config, Path], vllm: FakeVllm, tmp_path: Path
) -> None:
    config, path = made
    native = dataclasses.replace(config, paths=dataclasses.replace(config.paths, output_dir=str(tmp_path / "own")))
    expected = evaluate(native, path)
    assert not vllm.started
    found = evaluate(with_engine(config, tmp_path / "fast"), path)
    assert predictions(tmp_path / "fast") == predictions(tmp_path / "own")
    assert len(set(predictions(tmp_path / "own"))) == 3
    assert found == pytest.approx(expected)
    (arguments,) = vllm.started
    assert arguments["enable_prompt_embeds"] is True
    assert arguments["dtype"] == "float32"
    assert Path(arguments["model"]).parent == Path(config.paths.cache_dir) / "exports"
    ((prompts, sampling),) = vllm.asked  # a batch of three
    assert len({len(rows) for rows in prompts}) == 1
    assert len(prompts[0]) + config.llm.max_new_tokens == arguments["max_model_len"]
    assert sampling["max_tokens"] == 10
    assert sampling["stop_token_ids"]


class Counting:
    """An engine that only looks at its prompts."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def generate(self, prompts: Any, sampling: dict[str, Any]) -> list[list[int]]:
        self.lengths = [len(rows) for rows in prompts]
        return [[1] for _ in prompts]


def test_prompts_of_different_lengths_have_no_padding(llm_folder: Path, siglip_folder: Path) -> None:
    captioner, engine = build(llm_folder, siglip_folder), Counting()
    batch = collate(captioner, samples(1, 3, 2))
    VllmCaptioner(captioner, engine).generate(batch)
    assert len(set(engine.lengths)) == 3
    assert engine.lengths == batch.attention_mask.sum(1).tolist()


def test_the_export_is_made_once_or_given(made: tuple[Config, Path], vllm: FakeVllm, tmp_path: Path) -> None:
    config, path = made
    evaluate(with_engine(config, tmp_path / "first"), path)
    (folder,) = (Path(config.paths.cache_dir) / "exports").iterdir()
    written = (folder / "config.json").stat().st_mtime_ns
    evaluate(with_engine(config, tmp_path / "second"), path)
    assert (folder / "config.json").stat().st_mtime_ns == written
    export(path, tmp_path / "mine")
    evaluate(with_engine(config, tmp_path / "third", vllm_model=str(tmp_path / "mine")), path)
    assert [Path(arguments["model"]) for arguments in vllm.started] == [folder, folder, tmp_path / "mine"]
    exported = load_config(tmp_path / "mine")
    evaluate(with_engine(exported, tmp_path / "fourth"), tmp_path / "mine")
    assert Path(vllm.started[-1]["model"]) == tmp_path / "mine"
    assert predictions(tmp_path / "fourth") == predictions(tmp_path / "first")


def load_config(folder: Path) -> Config:
    from vlmcap.compose import from_plain, to_config
    from vlmcap.training.checkpoints.load import read_checkpoint

    return to_config(from_plain(read_checkpoint(folder)["vlmcap"]["config"], {"data.split": "val"}))


def test_an_export_of_another_checkpoint_is_refused(
    made: tuple[Config, Path], vllm: FakeVllm, tmp_path: Path, llm_folder: Path
) -> None:
    config, path = made
    export(path, tmp_path / "mine")
    content = torch.load(path, weights_only=True)
    content["global_step"] = 4
    torch.save(content, path)
    with pytest.raises(
        UserError,
        match=r"vllm_model=.*mine was exported from a different checkpoint \(.*best\.ckpt with .*\) than .*best\.ckpt",
    ):
        evaluate(with_engine(config, tmp_path / "out", vllm_model=str(tmp_path / "mine")), path)
    with pytest.raises(UserError, match=r"was not written by `vlmcap export`"):
        evaluate(with_engine(config, tmp_path / "out", vllm_model=str(llm_folder)), path)
    assert not vllm.started


def test_what_is_refused_is_refused_before_the_export(
    made: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = made
    with pytest.raises(UserError, match=r"evaluation\.num_beams=2"):
        evaluate(with_engine(config, tmp_path / "out", num_beams=2), path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs vLLM, which is not installed here"):
        evaluate(with_engine(config, tmp_path / "out"), path)
    with pytest.raises(UserError, match=r"evaluation\.engine=vllm works in evaluate\.py only"):
        train(with_engine(config, tmp_path / "out"))
    with pytest.raises(UserError, match=r"evaluation\.engine=vllm works in evaluate\.py only"):
        load_captioner(path, {"evaluation.engine": "vllm"})
    assert not (Path(config.paths.cache_dir) / "exports").exists()


def test_a_whole_model_is_refused(llava_folder: Path, aihub_root: Path, tmp_path: Path, vllm: FakeVllm) -> None:
    from vlmcap.training.checkpoints.trained import assemble_trained

    config = compose(
        ["model=llava_next_video_7b", f"model.checkpoint={llava_folder}", "data=aihub", f"data.root={aihub_root}"]
    )
    with pytest.raises(UserError, match=rf"which are not enough for model={llava_folder.name.lower()};"):
        assemble_trained(with_engine(config, tmp_path), tmp_path / "x.ckpt", {})


@pytest.mark.gpu
def test_the_real_vllm(made: tuple[Config, Path], tmp_path: Path) -> None:
    """Needs the interpreter of an environment with vLLM in VLMCAP_VLLM_PYTHON, or vLLM beside us."""
    import os

    python = os.environ.get("VLMCAP_VLLM_PYTHON")
    if python is None and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    config, path = made
    native = dataclasses.replace(config, paths=dataclasses.replace(config.paths, output_dir=str(tmp_path / "own")))
    evaluate(native, path)
    evaluate(with_engine(config, tmp_path / "fast", vllm_python=python, vllm_gpu_memory=0.3), path)
    # Greedy, in float32, but other kernels: a near tie may fall the other way.
    same = [a == b for a, b in zip(predictions(tmp_path / "own"), predictions(tmp_path / "fast"), strict=True)]
    assert sum(same) >= len(same) - 1
