"""How a vision tower of transformers lays out its features, found by running small random forms of its class.

Legend: K patches on a side of the small picture, T output tokens, P patches, Dv vision width.
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
from vlmcap.models.encoders.classes import TIMM, UnknownLayoutError, set_depth, square_side, tower_class

_SIDE = 4  # K
_ARGUMENT = "interpolate_pos_encoding"
_NEEDED = ("num_hidden_layers", "hidden_size", "patch_size")


@dataclass(frozen=True, slots=True)
class Layout:
    """What a class makes of a picture.

    Attributes:
        patch_size: Side of a patch in pixels.
        num_prefix_tokens: CLS and register tokens in front of the patches, which are in row-major order.
        embed_dim: Dv.
        is_any_size: Pictures of other sizes than the configuration's need no argument.
        arguments: Arguments of `forward` that other sizes need, where they are possible by them alone.
        unused: Parameters that play no part in the features, such as those of a pooling head, in the words of
            `numberless`; no checkpoint needs to hold them.
        idle: Modules of such parameters alone, which the tower can do without.
    """

    patch_size: int
    num_prefix_tokens: int
    embed_dim: int
    is_any_size: bool = False
    arguments: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """What follows the last block.

    Attributes:
        name: Module behind the last block; empty where there is none.
        is_counted: The last of the class's hidden states is behind it.
    """

    name: str
    is_counted: bool


def find_layout(config: Any) -> Layout:
    """The layout of the features that the class of a configuration returns.

    A tower of no blocks maps each patch to one token. Changing one patch after another shows which tokens belong to
    patches, and in which order they are.

    Raises:
        UnknownLayoutError: It returns no square grid with a token for each patch.
    """
    patch = _check_class(config, tower_class(config))
    return _find_layout(_Key(config), patch)


def find_final_norm(config: Any) -> FinalNorm | None:
    """The module that stands between the last block and what the class returns, or None where cutting gives no hidden state of it.

    A tower cut behind its first block must return what a tower of two blocks lists as its first hidden state.
    """
    return _find_final_norm(_Key(config))


def as_tokens(features: Tensor) -> Tensor:
    """Features as a sequence, whether a class returns (N, T, Dv) or a map (N, Dv, h, w)."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features  # (N, Dv, h, w) -> (N, h · w, Dv)


def numberless(name: str) -> str:
    """The name of a parameter with the numbers of blocks left out."""
    return re.sub(r"\d+", "#", name)


@dataclass(frozen=True, slots=True, eq=False)
class _Key:
    """A configuration that equals another one of the same content, whatever its number of blocks."""

    config: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    @property
    def _text(self) -> str:
        alike = copy.deepcopy(self.config)
        set_depth(alike, 1)
        return str(alike.to_json_string(use_diff=False))


@cache
def _find_layout(key: _Key, patch: int) -> Layout:
    config, model_class = key.config, tower_class(key.config)
    with _probing():
        try:
            tower, width = _shrunk(config, model_class, depth=0, size=_SIDE * patch)
            first = _first_patch(tower, patch, _run)
        except RuntimeError:  # some classes need a block; what enters it is not mixed either
            tower, width = _shrunk(config, model_class, depth=1, size=_SIDE * patch)
            first = _first_patch(tower, patch, _run_embeddings)
        _check_true_size(config, model_class, patch, first, int(tower.config.num_hidden_layers))
        size = (_SIDE + 2) * patch
        is_any_size = _has_patches(tower, size, patch, first)
        takes_argument = _ARGUMENT in inspect.signature(model_class.forward).parameters
        is_by_argument = (
            not is_any_size and takes_argument and _has_patches(tower, size, patch, first, **{_ARGUMENT: True})
        )
        # With a block, as blocks may share what stands beside them, such as biases by position.
        unused, idle = _unused_parts(_shrunk(config, model_class, depth=1, size=_SIDE * patch)[0], _SIDE * patch)
    return Layout(patch, first, width, is_any_size, (_ARGUMENT,) if is_by_argument else (), unused, idle)


def _check_class(config: Any, model_class: Any) -> int:
    """Side of a patch.

    Raises:
        UnknownLayoutError: The class takes something else than pictures, or has no patches or layers.
    """
    parameters = inspect.signature(model_class.forward).parameters
    if "pixel_values" not in parameters:
        raise UnknownLayoutError("takes no pictures")
    if getattr(config, "depths", None):
        raise UnknownLayoutError("is hierarchical, with stages of different grids")
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    others = [name for name, value in parameters.items() if value.default is value.empty and value.kind not in optional]
    others = [name for name in others if name not in ("self", "pixel_values")]
    if others:
        raise UnknownLayoutError(f"needs {', '.join(others)} beside the pixels of a picture")
    missing = [name for name in _NEEDED if not isinstance(getattr(config, name, None), int | list | tuple)]
    if missing:
        raise UnknownLayoutError(f"has no {missing[0]} in its configuration, and so no plain grid of patches")
    return square_side(config.patch_size)


@contextmanager
def _probing() -> Iterator[None]:
    """On the CPU with gradients, from a seed of its own.

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
    except Exception as error:  # whatever a class of transformers raises about its input
        raise UnknownLayoutError(f"fails on a plain picture ({type(error).__name__}: {first_line(error)})") from error


def _small_config(config: Any, depth: int, size: int | None, is_narrow: bool) -> Any:
    """A configuration of fewer and narrower blocks for smaller pictures.

    The width of a head stays, as positions may depend on it.
    """
    small = copy.deepcopy(config)
    set_depth(small, depth)
    own = getattr(config, "image_size", None)
    if size is not None and own is not None:
        small.image_size = type(own)([size] * len(own)) if isinstance(own, list | tuple) else size
        if small.model_type == TIMM:
            small.model_args = {**small.model_args, "img_size": size}
    if is_narrow:
        head = config.hidden_size // config.num_attention_heads
        small.num_attention_heads, small.hidden_size = 2, 2 * head
        for name, value in (("num_key_value_heads", 2), ("intermediate_size", 4 * head)):
            if isinstance(getattr(config, name, None), int):
                setattr(small, name, value)
    return small


def _shrunk(config: Any, model_class: Any, *, depth: int, size: int | None) -> tuple[Any, int]:
    """A random tower that runs on pictures of `size` pixels, narrow where its class allows it, and Dv of the true one."""
    side = square_side(config.image_size) if size is None else size
    try:
        tower = _random(model_class, _small_config(config, depth, size, is_narrow=True))
        found = _run(tower, torch.randn(1, 3, side, side))
    except ImportError:
        raise
    except Exception:  # widths that depend on each other in other ways
        tower = _random(model_class, _small_config(config, depth, size, is_narrow=False))
        found = _run(tower, torch.randn(1, 3, side, side))
    width = found.shape[-1]
    return tower, int(config.hidden_size if width == tower.config.hidden_size else width)


def _random(model_class: Any, config: Any) -> Any:
    """With noise in every tensor, as some classes start positions and scales at constants that would hide what they do."""
    tower = model_class._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return tower.eval()


def _run(tower: Any, pixels: Tensor, **arguments: Any) -> Tensor:
    """Tokens of pictures, (N, 3, S, S) -> (N, T, Dv)."""
    features = getattr(tower(pixel_values=pixels, **arguments), "last_hidden_state", None)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        raise UnknownLayoutError("returns no features of patches")
    return as_tokens(features)


def _run_embeddings(tower: Any, pixels: Tensor) -> Tensor:
    """What enters the first block, (N, 3, S, S) -> (N, T, Dv), of a class that returns tokens in the same places."""
    outputs = tower(pixel_values=pixels, output_hidden_states=True)
    embeddings = as_tokens(outputs.hidden_states[0])
    if embeddings.shape != as_tokens(outputs.last_hidden_state).shape:
        raise UnknownLayoutError("returns other tokens than it makes of its patches")
    return embeddings


@torch.no_grad()
def _first_patch(tower: Any, patch: int, run: Callable[[Any, Tensor], Tensor]) -> int:
    """Index of the first patch among the tokens.

    Raises:
        UnknownLayoutError: The tokens are no row-major grid of patches.
    """
    pixels = torch.randn(1, 3, _SIDE * patch, _SIDE * patch).repeat(1 + _SIDE**2, 1, 1, 1)
    for index in range(_SIDE**2):
        rows, columns = (slice(place * patch, (place + 1) * patch) for place in divmod(index, _SIDE))
        pixels[1 + index, :, rows, columns] = torch.randn(3, patch, patch)
    tokens = run(tower, pixels)
    is_map = tower(pixel_values=pixels[:1]).last_hidden_state.dim() == 4
    is_moved = ((tokens[1:] - tokens[:1]).abs().amax(-1) > 1e-4).T  # (T, P): tokens by the patches that move them
    patches = is_moved.any(1).nonzero().flatten().tolist()
    if len(patches) != _SIDE**2 or patches[-1] - patches[0] != len(patches) - 1:
        raise UnknownLayoutError(f"makes {len(patches)} tokens of {_SIDE**2} patches, and not one of each")
    found = is_moved[patches[0] : patches[-1] + 1]
    # A convolution behind the blocks lets a token of a map see the neighbours of its own patch, and of no other.
    allowed = _neighbours() if is_map else torch.eye(_SIDE**2, dtype=torch.bool)
    if not found.diagonal().all() or (found & ~allowed).any():
        raise UnknownLayoutError("mixes its patches or returns them in another order than row by row")
    return int(patches[0])


def _neighbours() -> Tensor:
    """(P, P): whether two patches touch."""
    places = torch.cartesian_prod(torch.arange(_SIDE), torch.arange(_SIDE))
    return (places[:, None] - places[None]).abs().amax(-1) <= 1


@torch.no_grad()
def _has_patches(tower: Any, size: int, patch: int, first: int, **arguments: Any) -> bool:
    """Whether pictures of another size give as many patches more."""
    known = _run(tower, torch.zeros(1, 3, _SIDE * patch, _SIDE * patch)).shape[1] - _SIDE**2
    try:
        found = _run(tower, torch.zeros(1, 3, size, size), **arguments).shape[1]
    except Exception:  # positions of one size alone
        return False
    return found - known == (size // patch) ** 2 and first <= known


def _check_true_size(config: Any, model_class: Any, patch: int, first: int, depth: int) -> None:
    """`UnknownLayoutError` where pictures of the configuration's own size give another number of patches, as in hierarchical towers."""
    own = getattr(config, "image_size", None)
    if own is None:
        return
    side = square_side(own)
    tower, _ = _shrunk(config, model_class, depth=depth, size=None)
    with torch.no_grad():
        found = _run(tower, torch.zeros(1, 3, side, side)).shape[1]
    if found < first + (side // patch) ** 2:
        raise UnknownLayoutError(f"returns {found} tokens for {(side // patch) ** 2} patches")


def _unused_parts(tower: Any, size: int) -> tuple[frozenset[str], tuple[str, ...]]:
    """Parameters without a gradient, and modules of theirs alone that can be left out."""
    pixels = torch.randn(1, 3, size, size)
    expected = _run(tower, pixels)
    expected.square().sum().backward()
    silent = {name for name, parameter in tower.named_parameters() if parameter.grad is None}
    idle: list[str] = []
    for name, module in list(tower.named_children()):
        names = {f"{name}.{inner}" for inner, _ in module.named_parameters()}
        if not names or not names <= silent:
            continue
        setattr(tower, name, nn.Identity())
        if _is_same(lambda: _run(tower, pixels), expected):
            idle.append(name)
        else:
            setattr(tower, name, module)
    return frozenset(map(numberless, silent)), tuple(idle)


@torch.no_grad()
def _is_same(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        found = compute()
    except Exception:  # what follows the module wants more than a tensor
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


@cache
def _find_final_norm(key: _Key) -> FinalNorm | None:
    config, model_class = key.config, tower_class(key.config)
    size = _SIDE * square_side(config.patch_size)
    pixels = torch.randn(1, 3, size, size, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    with _probing(), torch.no_grad():
        whole, _ = _shrunk(config, model_class, depth=2, size=size)
        outputs = whole(pixel_values=pixels, output_hidden_states=True)
        states, last = outputs.hidden_states, outputs.last_hidden_state
        if not states or len(states) != 3:
            return None
        cut, _ = _shrunk(config, model_class, depth=1, size=size)
        weights = whole.state_dict()
        cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
        name = _name_of_norm(cut, pixels, as_tokens(states[1]))
    return None if name is None else FinalNorm(name, torch.equal(states[-1], last))


def _name_of_norm(tower: Any, pixels: Tensor, expected: Tensor) -> str | None:
    """The normalisation without which the tower returns what is expected; empty where it does so with all of them."""
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
