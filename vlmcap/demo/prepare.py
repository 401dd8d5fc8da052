"""Makes the demo's clips and tiny components, and published weights out of packages, on first use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vlmcap.config import AihubConfig, Config, DemoConfig, DemoDataConfig, PatchEncoderConfig
from vlmcap.demo.published import make_published

TINY = "tiny"  # checkpoint name of the language model that is trained here, and below of the encoders
TINY_ENCODERS = (TINY, "tiny_siglip2", "tiny_dinov3", "tiny_internvit", "tiny_vjepa2", "tiny_untrained")


def prepare(config: Config) -> Config:
    """Returns the configuration with the folders of the demo's clips and tiny components, which are made if missing."""
    make_published(config)
    data, encoder, llm, evaluation = config.data, config.encoder, config.llm, config.evaluation
    if data.is_demo:
        folder = demo_folder(config)
        data = dataclasses.replace(data, root=str(folder))
        # The demo knows its facts, so fact accuracy needs no setting.
        if evaluation.facts is None:
            evaluation = dataclasses.replace(evaluation, facts=str(folder / "facts.json"))
    join = encoder.join if isinstance(encoder, PatchEncoderConfig) else None
    names = [one.checkpoint for one in (encoder, join) if one is not None and one.checkpoint in TINY_ENCODERS]
    if llm.checkpoint == TINY or names:
        components = tiny_components(config, names)
        if llm.checkpoint == TINY:
            llm = dataclasses.replace(llm, checkpoint=str(components["llm"]))
        if join is not None and join.checkpoint in names:
            join = dataclasses.replace(join, checkpoint=str(components[join.checkpoint]))
            encoder = dataclasses.replace(encoder, join=join)  # type: ignore[call-arg]
        if encoder.checkpoint in names:
            encoder = dataclasses.replace(encoder, checkpoint=str(components[encoder.checkpoint]))
    return dataclasses.replace(config, data=data, encoder=encoder, llm=llm, evaluation=evaluation)


def demo_folder(config: Config) -> Path:
    """Returns the folder of the demo's clips, which are written on first use."""
    from vlmcap.demo.clips import make_demo

    return make_demo(Path(config.paths.cache_dir) / "demo", demo_settings(config))


def demo_settings(config: Config) -> DemoConfig:
    """Returns the settings of the clips on which the tiny components are trained, whatever data the run itself uses."""
    return config.data.demo if isinstance(config.data, DemoDataConfig) else DemoConfig()


def tiny_components(config: Config, encoders: Sequence[str]) -> dict[str, Path]:
    """Returns the folders of the tiny language model, "llm", and of tiny encoders, trained on first use on demo clips.

    Args:
        config: Run configuration.
        encoders: Names of the encoders.
    """
    from transformers import AutoTokenizer

    from vlmcap.data.formats import Record, read_records
    from vlmcap.data.get_or_create import get_or_create
    from vlmcap.demo.tiny_encoders import make_encoder
    from vlmcap.demo.tiny_llm import ENCODER_STEPS, LANGUAGE_STEPS, RECIPE, make_language_model
    from vlmcap.terminal import progress_reporter

    folder = demo_folder(config)
    parts = folder.with_name(folder.name.replace("clips-", f"parts{RECIPE}-"))
    made = {"llm": parts / "llm"} | {name: parts / name.replace(TINY, "encoder") for name in encoders}
    if all(path.is_dir() for path in made.values()):  # reading all labels would delay each run
        return made
    entries = read_records(AihubConfig(root=str(folder)), "train")
    clips = [entry.clip for entry in entries if isinstance(entry, Record)]
    # A small demo, as tests make it, needs no long training.
    # 2000 clips are the default of `data.demo.num_train`.
    share = min(1.0, len(clips) / 2000)
    seed = demo_settings(config).seed

    def make_llm(target: Path) -> None:
        captions, steps = [clip.captions[0] for clip in clips], max(2, round(LANGUAGE_STEPS * share))
        with progress_reporter("training the tiny language model") as report:
            make_language_model(
                target, captions, prompt="영상을 설명해 주세요.", num_steps=steps, seed=seed, progress=report
            )

    def make_tiny_encoder(name: str, target: Path) -> None:
        # `llm` is assigned below, before this is called.
        tokenizer, steps = AutoTokenizer.from_pretrained(llm), max(2, round(ENCODER_STEPS * share))
        with progress_reporter(f"training encoder={name}") as report:
            make_encoder(target, clips, tokenizer, name=name, num_steps=steps, seed=seed, progress=report)

    llm = get_or_create(made["llm"], make_llm)
    return {"llm": llm} | {name: get_or_create(made[name], partial(make_tiny_encoder, name)) for name in encoders}
