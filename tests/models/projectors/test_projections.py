"""Projections match reference classes with the same weights, or the equations of their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.projectors.settings import settings_of
from vlmcap.config import ProjectorConfig
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.models.projectors.base import CrossAttention

Make = Callable[..., tuple[ProjectorConfig, ProjectorSizes]]

DV, DL, FRAMES = 6, 8, 4


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("use_layer_norm", [False, True])
def test_layers(kind: str, use_layer_norm: bool, spec_of: Make) -> None:
    depth = {"depth": 4} if kind == "mlp" else {}
    projection = build_projector(*spec_of(kind, use_layer_norm=use_layer_norm, **depth)).projection
    sizes = [(layer.in_features, layer.out_features) for layer in projection.modules() if isinstance(layer, nn.Linear)]
    assert sizes == ([(DV, DL)] if kind == "linear" else [(DV, DL)] + [(DL, DL)] * 3)
    assert [m.normalized_shape for m in projection.modules() if isinstance(m, nn.LayerNorm)] == (
        [(DV,)] if use_layer_norm else []
    )


def test_layer_norm_gives_features_a_common_scale(spec_of: Make) -> None:
    projector = build_projector(*spec_of(use_layer_norm=True))
    features = torch.randn(1, 4, 16, DV)
    torch.testing.assert_close(projector(features * 1000), projector(features), atol=1e-3, rtol=1e-3)


def test_two_layers_are_llava_next_videos_projector(
    spec_of: Make, record_property: Callable[[str, object], None]
) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoMultiModalProjector

    text: Any = LlamaConfig(
        hidden_size=DL, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    vision: Any = CLIPVisionConfig(hidden_size=DV, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    theirs = LlavaNextVideoMultiModalProjector(LlavaNextVideoConfig(vision_config=vision, text_config=text))
    ours = build_projector(*spec_of())
    names = {"linear_1": "projection.layers.0", "linear_2": "projection.layers.2"}
    ours.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()})
    features = torch.randn(2, 4, 16, DV)
    expected = theirs(features).flatten(1, 2)
    record_property("parity:projector:mlp", (ours(features) - expected).abs().max().item())
    torch.testing.assert_close(ours(features), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", [4, 6])
def test_pixel_shuffle_is_internvls(side: int, spec_of: Make, record_property: Callable[[str, object], None]) -> None:
    from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, Qwen2Config
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    vision: Any = InternVLVisionConfig(hidden_size=DV)
    theirs = InternVLMultiModalProjector(InternVLConfig(vision_config=vision, text_config=Qwen2Config(hidden_size=DL)))  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in theirs.layer_norm.parameters():
            weight.normal_()
    ours = build_projector(*spec_of("pixel_shuffle", grid=(side, side)))
    names = {"layer_norm": "projection.norm", "linear_1": "projection.layers.0", "linear_2": "projection.layers.2"}
    ours.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()})
    features = torch.randn(2, 4, side**2, DV)
    shuffled = InternVLModel.pixel_shuffle(None, features.reshape(8, side, side, DV), scale_factor=0.5)  # type: ignore[arg-type]
    expected = theirs(shuffled.reshape(2, 4 * (side // 2) ** 2, 4 * DV))
    record_property("parity:projector:pixel_shuffle", (ours(features) - expected).abs().max().item())
    torch.testing.assert_close(ours(features), expected, atol=1e-6, rtol=1e-6)


def test_pixel_shuffle_joins_neighbours_of_an_oblong_grid(spec_of: Make) -> None:
    from vlmcap.models.projectors.projections import shuffle_patches

    places = torch.arange(24).reshape(1, 1, 24, 1)  # 4 rows of 6
    joined = shuffle_patches(places, (4, 6), 2)[0, 0]
    assert joined.tolist() == [
        [6 * r + c, 6 * r + c + 1, 6 * r + 6 + c, 6 * r + 7 + c] for r in (0, 2) for c in (0, 2, 4)
    ]


def torch_attention(ours: CrossAttention, feature_dim: int) -> nn.MultiheadAttention:
    """Returns PyTorch's class with the same weights."""
    dim = ours.query.in_features
    theirs = nn.MultiheadAttention(dim, ours.num_heads, kdim=feature_dim, vdim=feature_dim, batch_first=True)
    key, value = ours.key_value.weight.chunk(2)
    weights = {"q": ours.query.weight, "k": key, "v": value}
    if theirs.in_proj_weight is not None:  # equal widths share one matrix
        state = {"in_proj_weight": torch.cat(list(weights.values()))}
    else:
        state = {f"{name}_proj_weight": weight for name, weight in weights.items()}
    state["in_proj_bias"] = torch.cat([ours.query.bias, ours.key_value.bias])
    theirs.load_state_dict(state | {"out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    return theirs


def test_the_question_attends_to_the_whole_clip_with_residual_and_norm(spec_of: Make) -> None:
    projector = build_projector(*spec_of("cross_attention", queries="prompt", num_layers=3, hidden_dim=12))
    features, question = torch.randn(2, FRAMES, 16, DV), torch.randn(5, DL)
    projection: Any = projector.projection
    words = projection.embed(question).expand(2, -1, -1)
    for layer in projection.layers:
        attended, _ = torch_attention(layer.attention, DV)(words, features.flatten(1, 2), features.flatten(1, 2))
        words = layer.norm(attended + words)
    torch.testing.assert_close(projector(features, prompt=question), projection.readout(words), atol=1e-6, rtol=1e-5)
    with pytest.raises(AssertionError, match="embeddings of the question"):
        projector(features)


def test_learned_queries_attend_with_residual_and_feed_forward(spec_of: Make) -> None:
    projector = build_projector(*spec_of("cross_attention", num_layers=2, hidden_dim=12))
    features = torch.randn(2, FRAMES, 16, DV)
    projection: Any = projector.projection
    seen, queries = projection.norm(features).flatten(0, 1), projection.queries.expand(2 * FRAMES, -1, -1)
    for layer in projection.layers:
        queries = queries + torch_attention(layer.attention, DV)(layer.norm(queries), seen, seen)[0]
        queries = queries + layer.feed_forward(queries)
    torch.testing.assert_close(
        projector(features), projection.readout(queries).reshape(2, FRAMES * 4, DL), atol=1e-6, rtol=1e-5
    )


def test_latents_attend_to_all_features_and_to_themselves(spec_of: Make) -> None:
    projector = build_projector(*spec_of("perceiver", num_layers=2, hidden_dim=12))
    features = torch.randn(2, FRAMES, 16, DV)
    projection: Any = projector.projection
    seen = projection.enter(projector.before(features, (4, 4)).flatten(1, 2))  # type: ignore[misc]
    latents = projection.latents.expand(2, -1, -1)
    for layer in projection.layers:
        queries = layer.latent_norm(latents)
        everything = torch.cat([layer.feature_norm(seen), queries], dim=1)
        latents = latents + torch_attention(layer.attention, 12)(queries, everything, everything)[0]
        latents = latents + layer.feed_forward(latents)
    torch.testing.assert_close(projector(features), projection.readout(latents), atol=1e-6, rtol=1e-5)


def moved_frames(projector: nn.Module, features: Tensor, frame: int) -> Tensor:
    """Returns which frames' tokens change with one frame."""
    changed = features.clone()
    changed[:, frame] = torch.randn_like(changed[:, frame])
    difference = (projector(features) - projector(changed)).abs().amax(-1)
    return difference.reshape(FRAMES, -1).amax(-1) > 1e-5


def test_learned_queries_see_their_own_frame_only(spec_of: Make) -> None:
    features = torch.randn(1, FRAMES, 16, DV)
    assert moved_frames(build_projector(*spec_of("cross_attention")), features, 1).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_learned_queries_see_the_kept_tokens_of_their_frame(spec_of: Make) -> None:
    """After saliency, frames have different numbers of tokens.

    With a frame embedding, each must still read its own.
    """
    projector = build_projector(*spec_of("cross_attention", reducer="saliency", keep_ratio=0.5))
    features = torch.randn(1, FRAMES, 16, DV)
    tokens, layout = projector._prepare(features, (4, 4), None)
    assert layout.frame_of is not None
    counts = layout.frame_of[0].bincount(minlength=FRAMES)
    assert len(set(counts.tolist())) > 1  # or a plain reshape would do
    alone = [build_alone(projector, tokens[:, :, layout.frame_of[0] == frame]) for frame in range(FRAMES)]
    torch.testing.assert_close(projector(features), torch.cat(alone, dim=1))


def build_alone(projector: Any, tokens: Tensor) -> Tensor:
    from vlmcap.models.projectors.base import TokenLayout

    projected: Tensor = projector.projection(tokens, TokenLayout((4, 4), 1)).flatten(1, 2)
    return projected


def test_latents_tell_frames_apart(spec_of: Make) -> None:
    projector = build_projector(*spec_of("perceiver"))
    features = torch.randn(1, FRAMES, 16, DV)
    assert not torch.allclose(projector(features), projector(features.flip(1)), atol=1e-4)
    assert torch.allclose(projector(features), projector(features.flip(2)), atol=1e-5)  # places it does not tell apart


@pytest.mark.parametrize("kind", ["cross_attention", "perceiver"])
def test_the_inner_width_keeps_true_sizes_small(kind: str) -> None:
    """DINOv3-H+ to Qwen3-32B with four layers.

    17 to 19 GiB of weights and optimiser state at the language model's width.
    """
    millions = {}
    for hidden_dim in (None, 5120):
        config = settings_of(kind, num_layers=4, num_queries=64, hidden_dim=hidden_dim)
        with torch.device("meta"):
            projector = build_projector(config, ProjectorSizes(1280, 5120, (16, 16), 16))
        millions[hidden_dim] = sum(weight.numel() for weight in projector.parameters()) / 1e6
    expected = {"cross_attention": (85.4, 1127.8), "perceiver": (87.1, 1291.7)}[kind]
    assert millions[None] == pytest.approx(expected[0], abs=0.1)
    assert millions[5120] == pytest.approx(expected[1], abs=0.1)


@pytest.mark.parametrize("queries", ["learned", "prompt"])
def test_half_precision_keeps_the_features_once_for_all_layers(spec_of: Make, queries: str) -> None:
    """At true size a copy is a quarter of a GiB."""
    projector = build_projector(*spec_of("cross_attention", queries=queries, num_layers=3, hidden_dim=12))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype is torch.bfloat16 and tensor.shape[-1] == DV and tensor.numel() == 2 * FRAMES * 16 * DV:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        tokens = projector(torch.randn(2, FRAMES, 16, DV), prompt=torch.randn(5, DL))
    assert len(kept) == 1
    tokens.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in projector.parameters())


def norm(maps: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean, variance = maps.mean(1, keepdim=True), maps.var(1, keepdim=True, correction=0)
    return (maps - mean) / (variance + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def block(maps: Tensor, layer: Any) -> Tensor:
    enter, norm_1, _, depthwise, norm_2, _, squeeze, leave, norm_3 = layer.branch
    inner = F.silu(norm(torch.einsum("oi,nihw->nohw", enter.weight[..., 0, 0], maps), norm_1))
    inner = F.silu(norm(F.conv2d(inner, depthwise.weight, padding=1, groups=inner.shape[1]), norm_2))
    reduce, _, expand, _ = squeeze.gate
    inner = inner * torch.sigmoid(expand(F.silu(reduce(inner.mean((2, 3))))))[..., None, None]
    inner = norm(torch.einsum("oi,nihw->nohw", leave.weight[..., 0, 0], inner), norm_3)
    if isinstance(layer.shortcut, nn.Sequential):
        maps = norm(torch.einsum("oi,nihw->nohw", layer.shortcut[0].weight[..., 0, 0], maps), layer.shortcut[1])
    return F.silu(inner + maps)


@pytest.mark.parametrize("hidden_dim", [None, 10])
def test_blocks_stand_around_an_adaptive_pooling(hidden_dim: int | None, spec_of: Make) -> None:
    projector = build_projector(*spec_of("c_abstractor", grid=(5, 7), hidden_dim=hidden_dim, num_queries=9))
    with torch.no_grad():
        for module in projector.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_()
                module.bias.normal_()
    projection: Any = projector.projection
    features = torch.randn(2, 4, 35, DV)
    maps = (features + projection.position).flatten(0, 1).transpose(1, 2).unflatten(2, (5, 7))
    for layer in projection.before:
        maps = block(maps, layer)
    maps = F.adaptive_avg_pool2d(maps, (3, 3))
    for layer in projection.after:
        maps = block(maps, layer)
    first, _, last = projection.readout
    expected = last(F.silu(first(maps.flatten(2).transpose(1, 2))))
    torch.testing.assert_close(projector(features), expected.reshape(2, 4 * 9, DL), atol=1e-5, rtol=1e-4)
    assert len(projection.before) == len(projection.after) == 2


def test_a_patch_moves_its_own_corner_most(spec_of: Make) -> None:
    """Tokens are row-major: a change in the last patch of the first row is the second of four tokens."""
    projector = build_projector(*spec_of("c_abstractor", grid=(12, 12), num_layers=1))
    features = torch.randn(1, 1, 144, DV)
    changed = features.clone()
    changed[0, 0, 9:12] += 5
    moved = (projector(features) - projector(changed)).abs().sum(-1)[0]
    assert moved.argmax() == 1
