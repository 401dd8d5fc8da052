"""A run whose data decides the prompt and the lengths of captions.

Its files hold the numbers, and its checkpoint needs no data.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.training.test_real_path import lines_of
from vlmcap.compose import compose
from vlmcap.config import KOREAN_PROMPT
from vlmcap.planning.known_data import planned
from vlmcap.training.checkpoints.load import load_captioner, read_checkpoint
from vlmcap.training.run import train

LENGTHS = ("llm.max_caption_tokens=", "llm.max_new_tokens=", "llm=")


def test_what_the_data_decides_is_kept(
    real_path: list[str], aihub_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [override for override in real_path if not override.startswith(LENGTHS)]
    overrides += ["llm=custom", "trainer.max_steps=1", "evaluation.max_clips=2", "data.splits.random=false"]
    train(compose(overrides))
    limit = planned(overrides).llm.max_caption_tokens
    shown = " ".join(capsys.readouterr().out.split())
    assert f"captions up to {limit} tokens" in shown
    plain = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    held = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["vlmcap"]["config"]
    for config in (plain, held):
        llm = config["llm"]
        assert (llm["max_caption_tokens"], llm["max_new_tokens"], llm["prompt"]) == (limit, limit, KOREAN_PROMPT)
        assert llm["name"] == Path(llm["checkpoint"]).name.lower()
    captioner = load_captioner(tmp_path / "run" / "checkpoints" / "last.ckpt", {"data.root": "gone"})
    assert captioner.generation.max_new_tokens == limit
    assert len(captioner.caption([aihub_root / "test" / "videos" / "test0.mp4"])) == 1
    assert all(row["id"] for row in lines_of(next((tmp_path / "run" / "predictions").glob("*.jsonl"))))
