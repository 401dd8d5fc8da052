"""Every YAML file composes, and every mistake in an override is one sentence that names the key and the mend."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tests.composing import Remembered
from tests.thinned import thinned
from vlmcap.compose import CUSTOM, compose, compose_node, from_plain, to_config, to_plain, write_yaml
from vlmcap.config import ASSUMED_CAPTION_TOKENS, AUTO, Config, LlmConfig, Precision, Quantization
from vlmcap.config.names import factors
from vlmcap.config_files import config_dir, use_config_dir
from vlmcap.errors import UserError
from vlmcap.sweep_syntax import expand

CONF = Path(config_dir())
GROUPS = sorted((file.parent.relative_to(CONF).as_posix(), file.stem) for file in CONF.glob("*/**/*.yaml"))
FILLED = ["data.root=data/clips"]  # what has no default, in some files
DEVICES = "hardware.devices=2"  # with one, trainer=ddp has no effect
CHECKPOINT = "encoder.checkpoint=models/tower"  # likewise in encoder=custom


def test_the_groups_were_found() -> None:
    assert {("encoder", "siglip2"), ("llm", "qwen3_8b"), ("hardware", "l4"), ("data", "aihub")} <= set(GROUPS)


def filled(name: str) -> list[str]:
    """What a data set, or an experiment on it, has no default for."""
    return [] if "demo" in name else FILLED


def rounds() -> list[list[tuple[str, str]]]:
    """Every file of every group once, a file a group in each round: composing costs a third of a second."""
    groups = {group for group, _ in GROUPS} - {
        "model",
        "experiment",
        "debug",
    }  # they exchange other groups; `own` comes with a whole model
    files = {group: [name for other, name in GROUPS if other == group and name != "native"] for group in sorted(groups)}
    return [
        [(group, names[turn % len(names)]) for group, names in files.items()]
        for turn in range(max(map(len, files.values())))
    ]


@pytest.mark.parametrize("chosen", rounds(), ids=lambda chosen: "+".join(name for _, name in chosen))
def test_every_file_composes(chosen: list[tuple[str, str]]) -> None:
    named = [f"{group}.checkpoint=hub/{CUSTOM}" for group, name in chosen if name == CUSTOM]
    config = compose([*(f"{group}={name}" for group, name in chosen), *named, *filled(dict(chosen)["data"]), DEVICES])
    for group, name in chosen:
        part = getattr(config, group)
        assert dataclasses.is_dataclass(part)
        assert getattr(part, "name", name) == name


@pytest.mark.parametrize("name", [name for group, name in GROUPS if group == "model" and name != "assembled"])
def test_every_whole_model_brings_its_parts(name: str) -> None:
    config = compose([f"model={name}", "hardware=l4", *(["model.checkpoint=hub/some"] if name == CUSTOM else [])])
    assert (config.model.name, config.model.kind) != ("assembled", "assembled")
    assert {config.encoder.name, config.projector.name, config.llm.name} == {"native"}
    assert config.encoder.checkpoint == config.llm.checkpoint == config.model.checkpoint
    assert config.llm.max_new_tokens == (1600 if name.startswith("llava") else AUTO)
    assert config.tuning.adapter_lr == config.llm.suggested.adapter_lr == 1e-4
    assert config.llm.quantization is Quantization["4bit"]


EXPERIMENTS = {
    "recommended_t4": ("clip", "mlp", "vicuna_7b", "t4", 4),
    "recommended_l4": ("siglip2", "mlp", "qwen3_8b", "l4", 8),
    "recommended_a100": ("dinov3_l", "mlp", "qwen3_14b", "a100", 8),
    "recommended_h100": ("dinov3_hplus", "cross_attention", "qwen3_32b", "h100", 16),
    "quality_h100": ("dinov3_hplus", "cross_attention", "qwen3_32b", "h100", 16),
    "efficient_t4": ("native", "native", "native", "t4", 4),
}

# A study and the number of its runs; what it is run on, which is no study itself, and a demo.
STUDIES = {
    "encoders": 4,
    "encoders_demo": 25,
    "encoders_motion_demo": 20,
    "projectors": 6,
    "projectors_demo": 35,
    "llms": 6,
    "adapters": 6,
    "adapters_demo": 30,
    "frames": 3,
    "frames_demo": 15,
    "stages": 2,
    "stages_demo": 10,
}
BASES = {"l4_short", "published_small"}


def test_no_experiment_was_forgotten() -> None:
    assert EXPERIMENTS.keys() | STUDIES.keys() | BASES == {name for group, name in GROUPS if group == "experiment"}


@pytest.mark.parametrize("is_whole_grid", thinned([False, True], lambda is_whole_grid: not is_whole_grid))
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_composes_and_differs(name: str, is_whole_grid: bool) -> None:
    """`-m` alone gives the whole grid; its head says what is asked, how, and how long it takes."""
    jobs, swept = expand([f"experiment={name}", *filled(name)])
    assert len(jobs) == STUDIES[name]
    assert ("seed" in swept) == name.endswith("_demo")
    composed = jobs if is_whole_grid else (jobs[0], jobs[-1])
    configs = [
        to_plain(compose(job))
        for job in composed
        if not is_whole_grid or not {f"seed={seed}" for seed in range(1, 5)} & set(job)
    ]
    assert len(configs) == (len(jobs) / (5 if name.endswith("_demo") else 1) if is_whole_grid else 2)
    assert all(config not in configs[:index] for index, config in enumerate(configs))
    head = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    assert f"python train.py -m experiment={name}" in head
    assert "?" in head
    assert re.search(r"\d+ runs", head)


@pytest.mark.parametrize("name", ["stages", "stages_demo"])
def test_one_stage_has_as_many_epochs_as_two(name: str) -> None:
    stages = [compose(job).tuning.stages for job in expand([f"experiment={name}", *filled(name)])[0]]
    assert {sum(stage.epochs for stage in two.values()) for two in stages} == {4 if name == "stages" else 18}
    assert {two["align"].epochs for two in stages} == {0, 1 if name == "stages" else 2}


def test_an_override_beats_the_values_of_a_study() -> None:
    jobs, swept = expand(["experiment=projectors_demo", "seed=5", "projector=mlp,linear"])
    assert [compose(job).projector.name for job in jobs] == ["mlp", "linear"]
    assert (swept, compose(jobs[0]).seed) == (["projector"], 5)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_the_combination_of_the_tables(name: str) -> None:
    config = compose([f"experiment={name}", *FILLED])
    found = (config.encoder.name, config.projector.name, config.llm.name, config.hardware.name, config.data.num_frames)
    assert found == EXPERIMENTS[name]
    assert config.llm.quantization is Quantization["4bit"]
    if config.projector.name == "cross_attention":
        assert config.projector.num_layers == 4
    if name == "quality_h100":
        assert (config.data.batch_size, config.encoder.image_size) == (8, 448)
    if name == "efficient_t4":
        assert (config.model.name, config.data.batch_size) == ("llava_next_video_7b", 1)
        assert config.hardware.gradient_checkpointing


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_file_starts_with_its_schema_and_says_what_it_is(group: str, name: str) -> None:
    """The schema is what refuses a typo; the comment is what a user reads."""
    text = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    if group not in ("experiment", "debug"):
        schema = yaml.safe_load(text)["defaults"][0]
        assert schema.partition("@")[0].endswith("_schema") or (CONF / group / f"{schema}.yaml").is_file()


def test_the_programs_files_compose() -> None:
    assert compose([]).encoder.name == "tiny"
    assert compose(["checkpoint=best.ckpt"], name="evaluate").checkpoint == "best.ckpt"


def test_help_names_every_choice() -> None:
    """The list in conf/train.yaml is written by hand, as Hydra's own would offer the schemas as choices."""
    template = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["hydra"]["help"]["template"]
    listed: dict[str, set[str]] = {}
    for line in template.splitlines():
        group, _, names = line.strip().partition(" ")
        if line.startswith(" " * 12):  # goes on from the line above
            group, names = list(listed)[-1], line
        listed.setdefault(group, set()).update(re.sub(r"[,:()]", " ", names).split())
    for group, name in GROUPS:
        assert name in listed[group] or name == "native"


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "encoder=clip",
            "llm=qwen3_8b",
            "hardware=l4",
            "data.num_frames=3",
            "tuning.lora.target_modules='q_proj,k_proj'",
            "seed=4",
        ],
        [
            "experiment=efficient_t4",
            "data.root='a b=c'",
            "data.batch_size=2",
            "++data.num_frames=3",
            "cache.enabled=true",
        ],
    ],
)
def test_what_the_tests_remember_is_what_hydra_composes(overrides: list[str]) -> None:
    remembered = Remembered(compose_node)
    for _ in range(2):
        found, expected = (
            remembered([*overrides, "paths.output_dir=here"]),
            compose_node([*overrides, "paths.output_dir=here"]),
        )
        assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
        assert to_config(found) == to_config(expected)
    with pytest.raises(UserError, match=r"there is no key 'data\.num_frame'"):
        remembered([*overrides, "data.num_frame=3"])


def test_the_real_combination() -> None:
    config = compose(["encoder=siglip2", "llm=qwen3_8b", "hardware=l4", "data=aihub", *FILLED])
    assert config.encoder.checkpoint == "google/siglip2-so400m-patch14-384"
    assert config.llm.checkpoint == "Qwen/Qwen3-8B"
    assert not config.llm.enable_thinking
    assert config.llm.quantization is Quantization["4bit"]
    assert config.hardware.precision is Precision.bf16
    assert config.hardware.gradient_checkpointing
    assert config.data.num_frames == config.hardware.num_frames
    assert config.tuning.stages["tune"].adapter_lr == config.llm.suggested.adapter_lr == 2e-4


def test_a_value_of_the_hardware_reaches_those_who_read_it() -> None:
    config = compose(["llm=qwen3_4b", "hardware=t4", "hardware.num_frames=6", "hardware.quantization=8bit"])
    assert (config.data.num_frames, config.llm.quantization.name) == (6, "8bit")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["encoder=siglp2"],
            [
                "encoder=siglp2 does not exist; choose one of aimv2_l, clip, custom, dinov2_reg_g,",
                "siglip2, siglip2_naflex, tiny",
            ],
        ),
        (["tuning=lroa"], ["tuning=lroa does not exist", "lora"]),
        (["encodr=clip"], ["no key 'encodr'", "did you mean encoder"]),
        (["data.num_frame=8"], ["no key 'data.num_frame'", "did you mean data.num_frames"]),
        (["tuning.epoch=3"], ["no key 'tuning.epoch'", "did you mean tuning.epochs"]),
        (["+llm.max_new_token=5"], ["no key 'llm.max_new_token'", "did you mean llm.max_new_tokens"]),
        (["+surprise=5"], ["no key 'surprise'"]),
        (["data.num_frames=many"], ["data.num_frames", "'many'", "Integer"]),
        (["data.num_frames=null"], ["data.num_frames", "not Optional"]),
        (["llm.quantization=5bit"], ["llm.quantization", "none, 8bit, 4bit"]),
        (["hardware.precision=bf17"], ["hardware.precision", "fp32, bf16, fp16"]),
        (["llm.enable_thinking=perhaps"], ["llm.enable_thinking", "bool"]),
        (["data=aihub"], ["data.root has no value", "data.root=…"]),
        (["data.root"], ["'data.root' cannot be read as key=value"]),
        (["lr=1e-3"], ["no key 'lr'", "set tuning.adapter_lr=1e-3"]),
        (["seed=-1"], ["seed must be at least 0"]),
        (["seed=4294967296"], ["below 4294967296, not 4294967296"]),
        (["data.splits.random=true", "data.splits.seed=-1"], ["data.splits.seed must be"]),
        (["tuning.lora.target_modules=5"], ["tuning.lora.target_modules=5", "[q_proj,v_proj]"]),
        (["projector.depth=0"], ["projector.depth must be at least 1, not 0"]),
        (["data.batch_size=0"], ["data.batch_size must be at least 1"]),
        (["data.max_bad_fraction=2"], ["data.max_bad_fraction must be in [0, 1]"]),
        (["tuning.lora.rank=0"], ["tuning.lora.rank"]),
        (["tuning.lora.dropout=1.5"], ["tuning.lora.dropout"]),
        (["llm.max_new_tokens=0"], ["llm.max_new_tokens must be at least 1"]),
        (["llm.max_caption_tokens=viel"], ["llm.max_caption_tokens must be at least 1, or auto", "not viel"]),
        (["encoder.tiling=0"], ["encoder.tiling must be at least 1"]),
        (["encoder.image_size=0"], ["encoder.image_size must be at least 1"]),
        (["projector.keep_ratio=0"], ["projector.keep_ratio must be above 0"]),
        (["evaluation.temperature=0"], ["evaluation.temperature must be above 0"]),
        (["evaluation.top_p=2"], ["evaluation.top_p must be above 0 and at most 1"]),
        (["tuning.encoder=lora"], ["tuning.encoder=lora changes the features", "cache.enabled=false"]),
        (
            ["model=qwen2_vl_7b", "encoder=clip"],
            ["model=qwen2_vl_7b brings its own encoder", "leave encoder=clip out", "model=assembled"],
        ),
        (["model=qwen2_vl_7b", "llm=qwen3_8b"], ["model=qwen2_vl_7b brings its own llm"]),
        (["model=qwen2_vl_7b", "projector.reducer=pool"], ["'reducer' is not a key of this projector"]),
        (["model=qwen2_vl_7b", "encoder.image_size=448"], ["'image_size' is not a key of this encoder"]),
        (["encoder.join=dinov3_l"], ["encoder.join cannot be set on the command line; set encoder=[NAME,NAME]"]),
        (
            ["encoder=siglip2", "encoder.join.image_size=448"],
            ["encoder.join.image_size cannot be set on the command line"],
        ),
        (
            ["model=qwen2_5_vl_7b", "model.use_outer_marks=false"],
            ["'use_outer_marks' is not a key of this model, only of model=qwen3_5_0_8b, ", "qwen3_vl_8b; leave"],
        ),
        (
            ["callbacks=profle"],
            ["callbacks=profle does not exist", "default, early_stopping, profile, visual_reliance"],
        ),
        (["callbacks.profile.first_step=0"], ["callbacks.profile.first_step must be at least 1, not 0"]),
        (["callbacks.profile.trace_steps=-1"], ["callbacks.profile.trace_steps must not be negative"]),
        (["sweep.budget_h=0"], ["sweep.budget_h must be above 0 hours, or null"]),
        (["sweep.budget_h=week"], ["sweep.budget_h", "'week'"]),
        (["sweep.budget=5"], ["no key 'sweep.budget'", "did you mean sweep.budget_h"]),
        (["encoder=native"], ["model=assembled has no native encoder", "choose another encoder"]),
        (["llm=native", "llm.name=x"], ["model=assembled has no native llm", "choose another llm"]),
        (
            ["llm=native", "llm.name=x", "llm.checkpoint=a/b"],
            ["model=assembled has no native llm", "choose another llm"],
        ),
        (
            ["model=qwen2_vl_7b", "llm=qwen3_8b", "llm.name=native"],
            ["model=qwen2_vl_7b brings its own llm", "leave llm=native out"],
        ),
        (
            ["model=qwen2_vl_7b", "llm.checkpoint=a/b"],
            ["llm.checkpoint=a/b has no effect in model=qwen2_vl_7b", "set model.checkpoint"],
        ),
        (["llm=custom"], ["llm.checkpoint has no value", "set it on the command line: llm.checkpoint=…"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence_with_the_key_and_the_mend(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    sentence = str(caught.value)
    assert all(part in sentence for part in expected), sentence
    assert "\n" not in sentence


def test_a_configuration_survives_plain_data_and_yaml(tmp_path: Path) -> None:
    config = compose(["encoder=clip", "llm=qwen3_4b", "hardware=h100", "llm.system_prompt='예: 아니오, \"네\"'"])
    plain = to_plain(config)
    assert to_config(from_plain(plain)) == config
    write_yaml(plain, tmp_path / "config.yaml")
    assert to_config(from_plain(yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")))) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_saved_configuration_with_overrides() -> None:
    plain = to_plain(compose([]))
    config = to_config(from_plain(plain, {"llm.max_new_tokens": 7, "data.split": "val"}))
    assert (config.llm.max_new_tokens, config.data.split.name) == (7, "val")
    for key, value in {"llm.max_token": 7, "data.num_frames": "viel"}.items():
        with pytest.raises(UserError, match=rf"^there is no key '{key}'|^{key} has a wrong value"):
            from_plain(plain, {key: value})


def test_a_saved_configuration_of_another_version() -> None:
    plain = to_plain(compose([]))
    plain["llm"]["colour"] = "blue"
    with pytest.raises(UserError, match=r"does not fit this version: there is no key 'llm\.colour'"):
        from_plain(plain)


def test_a_saved_configuration_that_lacks_a_value() -> None:
    plain = to_plain(compose([]))
    del plain["llm"]["checkpoint"]
    with pytest.raises(UserError, match=r"llm\.checkpoint has no value"):
        to_config(from_plain(plain))


@pytest.mark.parametrize(
    ("overrides", "part", "expected"),
    [
        (
            ["llm=vicuna_7b", "llm.checkpoint=HuggingFaceTB/SmolLM2-135M-Instruct"],
            "llm",
            ("smollm2-135m-instruct", "unknown", None),
        ),
        (["llm=custom", "llm.checkpoint=models/My-LLM/"], "llm", ("my-llm", "unknown", None)),
        (["llm=custom", "llm.checkpoint=cache/models--org--Solar/snapshots/0a1b"], "llm", ("solar", "unknown", None)),
        (["llm=qwen3_4b", "llm.checkpoint=a/b", "llm.name=mine", "llm.license=MIT"], "llm", ("mine", "MIT", None)),
        (["llm=vicuna_7b", "llm.checkpoint=a/b", "llm.chat_template=hello"], "llm", ("b", "unknown", "hello")),
        (["llm=qwen3_4b", "llm.checkpoint=Qwen/Qwen3-4B-Instruct-2507"], "llm", ("qwen3_4b", "Apache-2.0", None)),
        (["model=qwen2_vl_7b", "model.checkpoint=org/Other-VL"], "model", ("other-vl", "unknown", None)),
    ],
)
def test_a_part_is_called_what_its_checkpoint_is(
    overrides: list[str], part: str, expected: tuple[str, str, str | None]
) -> None:
    config = compose(overrides)
    found = getattr(config, part)
    assert (found.name, found.license, getattr(found, "chat_template", None)) == expected
    assert config.component_names[part] == expected[0] == factors(config)[part]


def test_a_gate_and_a_revision_are_those_of_the_checkpoint() -> None:
    own = compose(["encoder=dinov3_l"]).encoder
    other = compose(["encoder=dinov3_l", "encoder.checkpoint=org/free"]).encoder
    assert own.gate
    assert (other.gate, other.revision, other.name, other.feature_layer) == (None, None, "free", own.feature_layer)
    assert (
        compose(["encoder=dinov3_l", "encoder.checkpoint=org/free", "encoder.revision=main"]).encoder.revision == "main"
    )


def test_a_saved_configuration_keeps_its_names() -> None:
    config = compose(["llm=vicuna_7b", "llm.checkpoint=org/Other"])
    moved = to_config(from_plain(to_plain(config), {"llm.checkpoint": "elsewhere/llm"}))
    assert (moved.llm.name, moved.llm.checkpoint) == ("other", "elsewhere/llm")


def test_the_output_folder_is_a_path() -> None:
    assert compose([]).paths.output_dir.startswith("outputs/")
    assert compose(["paths.output_dir=here"]).paths.output_dir == "here"


def test_schema_defaults_are_what_a_file_leaves_out() -> None:
    assert compose(["llm=qwen3_4b"]).llm.max_caption_tokens == LlmConfig().max_caption_tokens
    assert isinstance(compose([]), Config)


def test_lengths_of_captions_and_the_prompt_are_left_to_the_data() -> None:
    config = compose(["llm=custom", "llm.checkpoint=a/b"]).llm
    assert (config.max_caption_tokens, config.max_new_tokens) == (AUTO, AUTO)
    assert (config.caption_tokens, config.new_tokens) == (ASSUMED_CAPTION_TOKENS,) * 2
    borrowed, given = ["llm=vicuna_7b", "llm.checkpoint=a/b"], "llm.max_new_tokens=200"
    assert (compose(borrowed).llm.max_caption_tokens, compose([*borrowed, given]).llm.new_tokens) == (AUTO, 200)
    assert compose(["llm=vicuna_7b"]).llm.caption_tokens == 1600
    assert (compose([]).llm.prompt, compose(["llm.checkpoint=a/b"]).llm.prompt) == ("영상을 설명해 주세요.", AUTO)


def test_modules_are_named_as_a_list_or_as_text() -> None:
    found = [
        compose([f"tuning.lora.target_modules={text}"]).tuning.lora.target_modules
        for text in ("[q_proj,v_proj]", "'q_proj,v_proj'")
    ]
    assert found == ["q_proj,v_proj"] * 2


def test_a_folder_of_ones_own_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMCAP_CONFIG_DIR", "")  # undone at the end
    for name, text in (("mine", "checkpoint: hub/mine"), ("clip", "checkpoint: hub/other")):
        (tmp_path / "encoder").mkdir(exist_ok=True)
        (tmp_path / "encoder" / f"{name}.yaml").write_text(
            f"# Of my own.\ndefaults: [patches_schema]\nname: {name}\n{text}\n"
        )
    use_config_dir(str(tmp_path))
    assert [compose([f"encoder={name}"]).encoder.checkpoint for name in ("mine", "clip")] == ["hub/mine", "hub/other"]
    assert compose(["encoder=mine"]).encoder.name == "mine"
    assert compose(["encoder=mine", "encoder.checkpoint=hub/third"]).encoder.name == "third"
    assert compose(["encoder=siglip2"]).encoder.checkpoint.startswith("google/")
    with pytest.raises(UserError, match=r"choose one of .*mine"):
        compose(["encoder=mien"])
    with pytest.raises(UserError, match=r"--config-dir .* is not a folder"):
        use_config_dir(str(tmp_path / "missing"))
