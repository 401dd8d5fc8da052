"""The feature layout of a vision tower of transformers, determined by running small random models of its class.

A tower of videos, which joins t consecutive frames to one token, sees an image as a clip of t equal frames.

Legend: K patches per side of the small image, N images, T output tokens, P patches, Dv vision width, S side in pixels.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import first_line
from vlmcap.models.encoders.classes import (
    TIMM,
    UnknownLayoutError,
    fixed_arguments,
    frame_size,
    frames_per_token,
    pixels_argument,
    set_depth,
    square_side,
    tower_class,
)

_SIDE = 4  # K
_ARGUMENT = "interpolate_pos_encoding"
_REQUIRED = ("num_hidden_layers", "hidden_size", "patch_size")


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of the features that a tower returns for an image.

    Attributes:
        patch_size: Side of a patch in pixels.
        num_prefix_tokens: Number of CLS and register tokens before the patches, which are in row-major order.
        embed_dim: Dv.
        is_any_size: Whether images of other sizes than the configured one need no argument.
        arguments: Arguments of `forward` that enable other sizes.
        unused: Names, as returned by `without_numbers`, of parameters that do not affect the features, such as those of
            a pooling head. A checkpoint may lack them.
        idle: Modules with unused parameters only, which can be removed from the tower.
        frames_per_token: Consecutive frames that a tower of videos joins to one token; 0 for a tower of images.
    """

    patch_size: int
    num_prefix_tokens: int
    embed_dim: int
    is_any_size: bool = False
    arguments: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()
    frames_per_token: int = 0


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """The normalisation after the last block.

    Attributes:
        name: Module name; empty if there is no such module.
        is_counted: Whether the last hidden state that the class returns is after it.
    """

    name: str
    is_counted: bool


def find_layout(config: Any) -> Layout:
    """Determines the layout of the features that the class of a configuration returns.

    A tower without blocks maps each patch to one token, so changing one patch after another shows which tokens belong
    to patches, and their order.

    Raises:
        UnknownLayoutError: The class does not return a square grid with one token per patch.
    """
    patch = _check_class(config, tower_class(config))
    return _find_layout(_Key(config), patch)


def find_final_norm(config: Any) -> FinalNorm | None:
    """Finds the module between the last block and the output; None if truncating the tower does not give hidden states.

    A tower truncated after its first block must return the first hidden state of a tower with two blocks.
    """
    return _find_final_norm(_Key(config))


def as_tokens(features: Tensor) -> Tensor:
    """Returns features as a sequence (N, T, Dv), also for classes that return a map (N, Dv, h, w)."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features  # (N, Dv, h, w) -> (N, h · w, Dv)


def without_numbers(name: str) -> str:
    """Returns the name of a parameter without the indices of blocks."""
    return re.sub(r"\d+", "#", name)


@dataclass(frozen=True, slots=True, eq=False)
class _Key:
    """Cache key of a configuration; equal for configurations that differ in the number of blocks only."""

    config: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._json == other._json

    def __hash__(self) -> int:
        return hash(self._json)

    @property
    def _json(self) -> str:
        shallow = copy.deepcopy(self.config)
        set_depth(shallow, 1)
        return str(shallow.to_json_string(use_diff=False))


@cache
def _find_layout(key: _Key, patch: int) -> Layout:
    config, model_class = key.config, tower_class(key.config)
    with _probing():
        try:
            tower, width = _shrunk(config, model_class, depth=0, size=_SIDE * patch)
            first = _first_patch(tower, patch, _run)
        except RuntimeError:  # some classes need a block, whose input has one token per patch too
            tower, width = _shrunk(config, model_class, depth=1, size=_SIDE * patch)
            first = _first_patch(tower, patch, _run_embeddings)
        _check_true_size(config, model_class, patch, first, int(tower.config.num_hidden_layers))
        num_joined, size = frames_per_token(config), (_SIDE + 2) * patch
        if num_joined:
            _check_time(config, model_class, patch, num_joined)
        is_any_size = not num_joined and _has_patches(tower, size, patch, first)
        has_argument = _ARGUMENT in inspect.signature(model_class.forward).parameters
        use_argument = not is_any_size and has_argument and _has_patches(tower, size, patch, first, **{_ARGUMENT: True})
        # With a block, as blocks may use modules outside of them, such as a shared relative position bias.
        tower, _ = _shrunk(config, model_class, depth=1, size=_SIDE * patch)
        unused, idle = _find_unused(tower, _SIDE * patch)
    return Layout(patch, first, width, is_any_size, (_ARGUMENT,) if use_argument else (), unused, idle, num_joined)


def _check_class(config: Any, model_class: Any) -> int:
    """Returns the side of a patch.

    Raises:
        UnknownLayoutError: The class takes other inputs than images, or has no patches or layers.
    """
    parameters, pixels = inspect.signature(model_class.forward).parameters, pixels_argument(model_class)
    if not pixels or (pixels != "pixel_values" and not frames_per_token(config)):
        raise UnknownLayoutError("takes no images")
    if getattr(config, "depths", None):
        raise UnknownLayoutError("is hierarchical, with stages of different grids")
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    others = [name for name, value in parameters.items() if value.default is value.empty and value.kind not in optional]
    others = [name for name in others if name not in ("self", pixels)]
    if others:
        raise UnknownLayoutError(f"needs {', '.join(others)} in addition to the pixels of an image")
    missing = [name for name in _REQUIRED if not isinstance(getattr(config, name, None), int | list | tuple)]
    if missing:
        raise UnknownLayoutError(f"has no {missing[0]} in its configuration, and so no plain grid of patches")
    return square_side(config.patch_size)


@contextmanager
def _probing() -> Iterator[None]:
    """Runs probes on the CPU with gradients and a fixed seed.

    Raises:
        UnknownLayoutError: The class failed.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            yield
    except UnknownLayoutError:
        raise
    except ImportError as error:
        raise UnknownLayoutError(f"needs a package that is not installed ({first_line(error)})") from error
    except Exception as error:  # transformers classes raise many types for unsuitable input
        raise UnknownLayoutError(f"fails on a plain image ({type(error).__name__}: {first_line(error)})") from error


def _small_config(config: Any, depth: int, size: int | None, is_narrow: bool) -> Any:
    """Returns a configuration with fewer and narrower blocks for smaller images.

    The head width is kept, as position embeddings may depend on it.
    """
    small = copy.deepcopy(config)
    set_depth(small, depth)
    native = frame_size(config)
    if size is not None and native is not None:
        name = "image_size" if getattr(config, "image_size", None) else "crop_size"
        setattr(small, name, type(native)([size] * len(native)) if isinstance(native, list | tuple) else size)
        if small.model_type == TIMM:
            small.model_args = {**small.model_args, "img_size": size}
    if is_narrow:
        head = config.hidden_size // config.num_attention_heads
        # Two heads of the same width.
        small.num_attention_heads, small.hidden_size = 2, 2 * head
        for name, value in (("num_key_value_heads", 2), ("intermediate_size", 4 * head)):
            if isinstance(getattr(config, name, None), int):
                setattr(small, name, value)
    for name, value in (("num_frames", frames_per_token(config)), ("pred_num_hidden_layers", 1)):
        if hasattr(config, name):
            setattr(small, name, value)
    return small


def _shrunk(config: Any, model_class: Any, *, depth: int, size: int | None) -> tuple[Any, int]:
    """Builds a random tower for images of `size` pixels, narrow if possible, and returns it with the true Dv."""
    side = square_side(frame_size(config)) if size is None else size
    try:
        tower = _random_tower(model_class, _small_config(config, depth, size, is_narrow=True))
        output = _run(tower, torch.randn(1, 3, side, side))
    except ImportError:
        raise
    except Exception:  # the widths of the class are related in another way
        tower = _random_tower(model_class, _small_config(config, depth, size, is_narrow=False))
        output = _run(tower, torch.randn(1, 3, side, side))
    width = output.shape[-1]
    return tower, int(config.hidden_size if width == tower.config.hidden_size else width)


def _random_tower(model_class: Any, config: Any) -> Any:
    """Builds a tower with noise in every tensor, as some classes initialise positions and scales to constants."""
    tower = model_class._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return tower.eval()


def _call(tower: Any, pixels: Tensor, **arguments: Any) -> Any:
    """Returns the outputs of the class for images (N, 3, S, S) or clips (N, F, 3, S, S)."""
    if pixels.dim() == 4 and (num_joined := frames_per_token(tower.config)):
        pixels = pixels[:, None].expand(-1, num_joined, -1, -1, -1)  # (N, 3, S, S) -> (N, t, 3, S, S)
    return tower(**{pixels_argument(type(tower)): pixels}, **fixed_arguments(type(tower)), **arguments)


def _run(tower: Any, pixels: Tensor, **arguments: Any) -> Tensor:
    """Returns the tokens of images, (N, 3, S, S) -> (N, T, Dv)."""
    features = getattr(_call(tower, pixels, **arguments), "last_hidden_state", None)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        raise UnknownLayoutError("returns no features of patches")
    return as_tokens(features)


def _run_embeddings(tower: Any, pixels: Tensor) -> Tensor:
    """Returns the input of the first block, (N, 3, S, S) -> (N, T, Dv), if the output has the same tokens."""
    outputs = _call(tower, pixels, output_hidden_states=True)
    embeddings = as_tokens(outputs.hidden_states[0])
    if embeddings.shape != as_tokens(outputs.last_hidden_state).shape:
        raise UnknownLayoutError("returns other tokens than those of its patch embedding")
    return embeddings


@torch.no_grad()
def _first_patch(tower: Any, patch: int, run: Callable[[Any, Tensor], Tensor]) -> int:
    """Returns the index of the first patch among the tokens.

    Raises:
        UnknownLayoutError: The tokens are not a row-major grid of patches.
    """
    # Image 0 is random, and image 1 + i differs from it in patch i.
    pixels = torch.randn(1, 3, _SIDE * patch, _SIDE * patch).repeat(1 + _SIDE**2, 1, 1, 1)
    for index in range(_SIDE**2):
        rows, columns = (slice(offset * patch, (offset + 1) * patch) for offset in divmod(index, _SIDE))
        pixels[1 + index, :, rows, columns] = torch.randn(3, patch, patch)
    tokens = run(tower, pixels)
    is_map = _call(tower, pixels[:1]).last_hidden_state.dim() == 4
    is_moved = ((tokens[1:] - tokens[:1]).abs().amax(-1) > 1e-4).T  # (T, P): tokens by the patches that move them
    patches = is_moved.any(1).nonzero().flatten().tolist()
    if len(patches) != _SIDE**2 or patches[-1] - patches[0] != len(patches) - 1:
        raise UnknownLayoutError(f"returns {len(patches)} tokens for {_SIDE**2} patches, not one for each")
    moved_by = is_moved[patches[0] : patches[-1] + 1]
    # A convolution after the blocks lets a token of a map see the neighbours of its own patch, but no other patch.
    allowed = _neighbours() if is_map else torch.eye(_SIDE**2, dtype=torch.bool)
    if not moved_by.diagonal().all() or (moved_by & ~allowed).any():
        raise UnknownLayoutError("mixes its patches or returns them in another order than row by row")
    return int(patches[0])


@torch.no_grad()
def _check_time(config: Any, model_class: Any, patch: int, num_joined: int) -> None:
    """Raises `UnknownLayoutError` unless the tokens of a clip follow each other in time, each of its own frames."""
    small = _small_config(config, 0, _SIDE * patch, is_narrow=True)
    if hasattr(small, "num_frames"):
        small.num_frames = 2 * num_joined
    tower = _random_tower(model_class, small)
    clips = torch.randn(1, 2 * num_joined, 3, _SIDE * patch, _SIDE * patch).repeat(2, 1, 1, 1, 1)
    clips[1, num_joined:] = torch.randn_like(clips[1, num_joined:])
    tokens = _run(tower, clips)
    is_moved = ((tokens[1] - tokens[0]).abs().amax(-1) > 1e-4)[-2 * _SIDE**2 :]  # (T, Dv) -> (2 · P,)
    if len(is_moved) != 2 * _SIDE**2 or is_moved[: _SIDE**2].any() or not is_moved[_SIDE**2 :].all():
        raise UnknownLayoutError("mixes frames or returns their patches in another order than frame by frame")


def _neighbours() -> Tensor:
    """Returns whether two patches touch, bool (P, P)."""
    positions = torch.cartesian_prod(torch.arange(_SIDE), torch.arange(_SIDE))
    return (positions[:, None] - positions[None]).abs().amax(-1) <= 1


@torch.no_grad()
def _has_patches(tower: Any, size: int, patch: int, first: int, **arguments: Any) -> bool:
    """Returns whether an image of another size gives the expected number of patches."""
    known = _run(tower, torch.zeros(1, 3, _SIDE * patch, _SIDE * patch)).shape[1] - _SIDE**2
    try:
        num_tokens = _run(tower, torch.zeros(1, 3, size, size), **arguments).shape[1]
    except Exception:  # position embeddings of one size only
        return False
    return num_tokens - known == (size // patch) ** 2 and first <= known


def _check_true_size(config: Any, model_class: Any, patch: int, first: int, depth: int) -> None:
    """Raises `UnknownLayoutError` if images of the configured size give too few patches, as in hierarchical towers."""
    native = frame_size(config)
    if native is None:
        return
    side = square_side(native)
    tower, _ = _shrunk(config, model_class, depth=depth, size=None)
    with torch.no_grad():
        num_tokens = _run(tower, torch.zeros(1, 3, side, side)).shape[1]
    if num_tokens < first + (side // patch) ** 2:
        raise UnknownLayoutError(f"returns {num_tokens} tokens for {(side // patch) ** 2} patches")


def _find_unused(tower: Any, size: int) -> tuple[frozenset[str], tuple[str, ...]]:
    """Returns parameters without a gradient, and modules with only such parameters that can be removed."""
    pixels = torch.randn(1, 3, size, size)
    expected = _run(tower, pixels)
    expected.square().sum().backward()
    unused = {name for name, parameter in tower.named_parameters() if parameter.grad is None}
    idle: list[str] = []
    for name, module in list(tower.named_children()):
        names = {f"{name}.{inner}" for inner, _ in module.named_parameters()}
        if not names or not names <= unused:
            continue
        setattr(tower, name, nn.Identity())
        if _is_same(lambda: _run(tower, pixels), expected):
            idle.append(name)
        else:
            setattr(tower, name, module)
    return frozenset(map(without_numbers, unused)), tuple(idle)


@torch.no_grad()
def _is_same(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        output = compute()
    except Exception:  # the caller of the module expects more than a tensor
        return False
    return output.shape == expected.shape and torch.allclose(output, expected, atol=1e-5, rtol=1e-5)


@cache
def _find_final_norm(key: _Key) -> FinalNorm | None:
    config, model_class = key.config, tower_class(key.config)
    size = _SIDE * square_side(config.patch_size)
    pixels = torch.randn(1, 3, size, size, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    with _probing(), torch.no_grad():
        deep, _ = _shrunk(config, model_class, depth=2, size=size)
        outputs = _call(deep, pixels, output_hidden_states=True)
        states, last = outputs.hidden_states, outputs.last_hidden_state
        if not states or len(states) != 3:
            return None
        truncated, _ = _shrunk(config, model_class, depth=1, size=size)
        weights = deep.state_dict()
        truncated.load_state_dict({name: weights[name] for name in truncated.state_dict()})
        name = _find_norm_name(truncated, pixels, as_tokens(states[1]))
    return None if name is None else FinalNorm(name, torch.equal(states[-1], last))


def _find_norm_name(tower: Any, pixels: Tensor, expected: Tensor) -> str | None:
    """Returns the norm without which the tower gives the expected output; empty if it does so with all norms."""
    if _is_same(lambda: _run(tower, pixels), expected):
        return ""
    for name, module in list(tower.named_modules()):
        if "norm" not in type(module).__name__.lower() or any(part.isdigit() for part in name.split(".")):
            continue
        tower.set_submodule(name, nn.Identity())
        if _is_same(lambda: _run(tower, pixels), expected):
            return name
        tower.set_submodule(name, module)
    return None
