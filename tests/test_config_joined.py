"""`encoder=[NAME,NAME]` composes two encoders into one configuration, also as a value of a sweep."""

from __future__ import annotations

import pytest

from vlmcap.compose import compose, from_plain, to_config, to_plain
from vlmcap.config import PatchEncoderConfig
from vlmcap.errors import UserError
from vlmcap.overrides import read_overrides


def joined(*overrides: str) -> PatchEncoderConfig:
    encoder = compose(["hardware=l4", "llm=qwen3_8b", *overrides]).encoder
    assert isinstance(encoder, PatchEncoderConfig)
    return encoder


def test_the_group_has_the_values_of_the_first_and_join_those_of_the_second() -> None:
    first, second = joined("encoder=clip"), joined("encoder=dinov3_l", "encoder.image_size=null")
    both = joined("encoder=[clip,dinov3_l]")
    assert both.join is not None
    assert both.name == "clip+dinov3_l"
    for one, alone in ((both, first), (both.join, second)):
        names = ("checkpoint", "feature_layer", "gate", "license", "image_size", "tiling")
        assert [getattr(one, name) for name in names] == [getattr(alone, name) for name in names]


def test_values_of_the_command_line_belong_to_the_first() -> None:
    both = joined("encoder=[dinov3_l,clip]", "encoder.image_size=448", "encoder.name=mine")
    assert both.join is not None
    assert (both.name, both.image_size, both.join.image_size) == ("mine", 448, None)


def test_it_is_the_same_after_it_was_saved() -> None:
    config = compose(["encoder=[tiny,tiny_vjepa2]"])
    assert to_config(from_plain(to_plain(config))) == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[clip]", r"encoder=\[clip\] joins 1 encoders, but two can be joined"),
        ("[clip,siglip2,dinov3_l]", r"joins 3 encoders, but two can be joined; set encoder=\[NAME,NAME\]"),
        ("[clip,siglip2_naflex]", "encoder=siglip2_naflex cannot be joined with another"),
    ],
)
def test_what_cannot_be_joined_is_refused(value: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        joined(f"encoder={value}")
    assert "\n" not in str(caught.value)


def test_tiles_and_pooled_features_are_refused() -> None:
    with pytest.raises(UserError, match=r"encoder\.tiling splits frames.*set encoder\.tiling=1"):
        joined("encoder=[clip,dinov3_l]", "encoder.tiling=4")
    with pytest.raises(UserError, match=r"features of joined encoders are stored apart; set cache\.pooled=false"):
        joined("encoder=[clip,dinov3_l]", "projector.reducer=pool", "cache.enabled=true", "cache.pooled=true")


def test_a_sweep_takes_lists_beside_names() -> None:
    from vlmcap.sweep_syntax import expand

    value = "encoder=clip,[clip,dinov3_l]"
    assert read_overrides([value], is_sweep=True) == [value]
    jobs, swept = expand([value])
    assert swept == ["encoder"]
    assert [joined(*job).name for job in jobs] == ["clip", "clip+dinov3_l"]
