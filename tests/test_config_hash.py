"""Configurations whose runs come to the same have equal hashes, and others have not."""

from __future__ import annotations

import pytest

from tests.thinned import thinned
from vlmcap.compose import compose
from vlmcap.config_hash import config_hash

DATA = ["data=jsonl", "data.root=clips"]
GPUS = ["hardware=l4", "hardware.devices=2"]
EQUAL: dict[str, list[list[str]]] = {
    "labels": [[], ["encoder.name=x", "llm.name=y", "hardware.name=z"]],
    "a file and its values": [["projector=mlp4"], ["projector=mlp", "projector.depth=4"]],
    "another file": [["projector=perceiver_64"], ["projector=perceiver", "projector.num_queries=64"]],
    "a tuning's file": [
        ["tuning=demo"],
        ["tuning=two_stage", "tuning.align_epochs=0", "tuning.epochs=18"],
    ],
    "a group and its kind": [["optim=adamw_fused"], ["optim.kind=adamw_fused"]],
    "one stage by two names": [
        ["tuning=lora", "tuning.epochs=4"],
        ["tuning=two_stage", "tuning.align_epochs=0", "tuning.epochs=4"],
    ],
    "the first stage alone": [
        ["tuning=projector_only", "tuning.epochs=2"],
        ["tuning=two_stage", "tuning.epochs=2", "tuning.align_epochs=2"],
    ],
    "a bound beyond the epochs": [["tuning=lora"], ["tuning=lora", "tuning.max_stage_epochs=9"]],
    "a bound below": [["tuning=lora", "tuning.max_stage_epochs=1"], ["tuning=lora", "tuning.epochs=1"]],
    "the profile and who follows": [["hardware.num_frames=4"], ["data.num_frames=4"]],
    "likewise of batches": [["hardware.batch_size=4"], ["data.batch_size=4"]],
    "likewise of stacks": [["hardware.frame_stack=4"], ["projector.frame_stack=4"]],
    "likewise of attention": [["hardware.attention=eager"], ["llm.attention=eager"]],
    "batches that tokens size": [
        ["data.batching=packed", "data.max_tokens_per_batch=400"],
        ["data.batching=packed", "data.max_tokens_per_batch=400", "debug=null", "hardware=cpu"],
    ],
    "a default": [
        [],
        ["tuning.adapter_lr=0.004", "evaluation.do_sample=false", "cache.enabled=true", "projector.pool_size=2"],
    ],
    "what is shown": [
        [],
        ["data.num_workers=7", "trainer.progress_bar=false", "logger=none", "trainer.log_every_n_steps=3"],
    ],
    "order": [["seed=1", "projector=linear", "tuning.epochs=9"], ["tuning.epochs=9", "seed=1", "projector=linear"]],
    "numbers": [
        ["evaluation.length_penalty=1", "optim.max_grad_norm=1"],
        ["evaluation.length_penalty=1.0", "optim.max_grad_norm=1e0"],
    ],
    "numbers in what has no schema": [
        ["callbacks.extra=[{_target_: a.B, x: 1}]"],
        ["callbacks.extra=[{x: 1.0, _target_: a.B}]"],
    ],
    "truth": [["cache.enabled=true"], ["cache.enabled=1"]],
    "lists": [["tuning.lora.target_modules=[q_proj,v_proj]"], ["tuning.lora.target_modules='v_proj, q_proj'"]],
    "empty texts": [[], ["llm.system_prompt=''", "llm.chat_template=''"]],
    "a direction by itself": [[], ["mode=max"]],
    "a loss by itself": [["monitor=val/loss"], ["monitor=val/loss", "mode=min"]],
    "processes": [GPUS, [*GPUS, "trainer=ddp"]],
    "paths": [DATA, [*DATA[:1], "data.root=./clips/"], [*DATA[:1], "data.root=a/../clips"]],
    "addresses": [
        ["data=webdataset", "data.root=s3://bucket/clips"],
        ["data=webdataset", "data.root=s3://bucket/clips/"],
    ],
    "folders of parts": [
        ["encoder=custom", "encoder.checkpoint=a/b/c"],
        ["encoder=custom", "encoder.checkpoint=./a/b/c/"],
    ],
    "an encoder": [["encoder=siglip2"], ["encoder=custom", "encoder.checkpoint=google/siglip2-so400m-patch14-384"]],
    "a language model": [["llm=qwen3_4b"], ["llm=custom", "llm.checkpoint=Qwen/Qwen3-4B-Instruct-2507"]],
    "a whole model": [["model=qwen2_5_vl_7b"], ["model=custom", "model.checkpoint=Qwen/Qwen2.5-VL-7B-Instruct"]],
    "another of its class": [["model=qwen3_vl_8b", "model.checkpoint=a/b"], ["model=custom", "model.checkpoint=a/b"]],
}
DIFFERENT: dict[str, list[list[str]]] = {
    "numbers": [
        [],
        ["tuning.epochs=13"],
        ["tuning.adapter_lr=1e-3"],
        ["tuning.align_epochs=2"],
        ["tuning.align_epochs=2 tuning.align_lr=1e-3"],
        ["seed=1"],
        ["data.num_frames=4"],
    ],
    "parts": [
        [f"projector={name}"]
        for name in ("mlp", "mlp4", "linear", "perceiver", "perceiver_64", "c_abstractor", "cross_attention")
    ],
    "tunings": [[f"tuning={name}"] for name in ("two_stage", "lora", "projector_only", "full", "demo")],
    "adapters": [
        ["tuning=lora"],
        ["tuning=lora", "tuning.lora.rank=4"],
        ["tuning=lora", "tuning.lora.use_rslora=true"],
    ],
    "checkpoints of one name": [[f"encoder=custom encoder.checkpoint={org}/model"] for org in ("org1", "org2")],
    "revisions": [["encoder=siglip2"], ["encoder=siglip2", "encoder.revision=abc"]],
    "data": [["data=jsonl", f"data.root={root}"] for root in ("a", "b")],
    "captions": [[], ["evaluation.num_beams=2"], ["evaluation.do_sample=true"], ["evaluation.repetition_penalty=1.1"]],
    "what is followed": [[], ["monitor=val/loss"], ["mode=min"], ["callbacks.early_stopping.enabled=true"]],
    "shards": [[*GPUS, "llm.quantization=none"], [*GPUS, "llm.quantization=none", "trainer=fsdp2"]],
    "a tower's attention": [["hardware=l4"], ["hardware=l4", "hardware.attention=sdpa", "llm.attention=auto"]],
}


@pytest.mark.parametrize(
    "name", thinned(EQUAL, lambda name: name in ("labels", "a file and its values", "a default", "a whole model"))
)
def test_configurations_whose_runs_are_equal_have_equal_hashes(name: str) -> None:
    assert len({config_hash(compose(one)) for one in EQUAL[name]}) == 1


@pytest.mark.parametrize("name", thinned(DIFFERENT, lambda name: name in ("numbers", "adapters")))
def test_others_have_not(name: str) -> None:
    cases = [[word for one in case for word in one.split()] for case in DIFFERENT[name]]
    assert len({config_hash(compose(case)) for case in cases}) == len(cases)
