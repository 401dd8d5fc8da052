"""Which model types of transformers are taken, and why the others are not."""

from __future__ import annotations

import pytest

from vlmcap.config.kinds import SCHEMAS
from vlmcap.errors import UserError
from vlmcap.models.pretrained.families import FAMILIES, family_of, known_types, obstacle


def test_every_family_is_known_and_has_settings() -> None:
    assert FAMILIES.keys() <= known_types().keys()
    assert {family.kind for family in FAMILIES.values()} <= SCHEMAS["model"].keys()


@pytest.mark.parametrize("model_type", sorted(set(known_types()) - set(FAMILIES)))
def test_every_other_type_is_refused_in_one_sentence(model_type: str) -> None:
    with pytest.raises(
        UserError, match=rf"model type {model_type}, .* as it.* encoder=custom and llm=custom"
    ) as caught:
        family_of(model_type)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("paligemma", "both directions"),
        ("vipllava", "several layers"),
        ("kosmos-2", "no causal class"),
        ("gemma4", "positions of patches besides pixels"),
        ("perception_lm", "comes from timm"),
        ("llava_next", "needs image_sizes besides pixels"),
        ("molmo2", "needs image_token_pooling and image_grids besides pixels"),
        ("glm4v", "positions of patches were not"),
        ("mllama", "no function from pixels to visual tokens"),
        ("qwen3", "no model of images and text"),
    ],
)
def test_the_reason_is_read_from_the_class(model_type: str, reason: str) -> None:
    assert reason in obstacle(model_type)


def test_every_refused_type_has_a_reason() -> None:
    assert "it was not compared with its class" not in {
        obstacle(name) for name in known_types() if name not in FAMILIES
    }
