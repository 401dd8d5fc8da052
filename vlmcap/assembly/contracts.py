"""Contracts of a plugin's component on which the rest of the package relies, checked at small sizes without a model.

Legend: B batch, F frames, P patches per frame, Dv vision width, V visual tokens per clip, Dl language width.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vlmcap.config import ProjectorConfig
from vlmcap.config.kinds import maker_of, schema_of
from vlmcap.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from vlmcap.models.encoders import VisionEncoder
    from vlmcap.models.projectors import Projector

Contract = tuple[str, Callable[[], None]]
Settings = Callable[[], Any]
_GRIDS = ((8, 8), (4, 8), (12, 8))  # rows × columns of patches; the first is the grid of the encoder
_FRAMES = (4, 2, 1)  # numbers of frames per clip
_PROMPT = 5  # number of tokens of the question


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one contract of one component.

    Attributes:
        group: Group of the component, such as "projector".
        kind: Kind of the component.
        contract: Expected behaviour.
        problem: Actual behaviour in one line; empty if the contract holds.
    """

    group: str
    kind: str
    contract: str
    problem: str = ""


def check_component(group: str, kind: str, settings: Settings | None = None) -> list[Outcome]:
    """Checks every contract of a component, independently of each other.

    Args:
        group: "projector", "encoder", "llm", "metric" or "data".
        kind: Registered kind.
        settings: Function that returns the settings; None uses their defaults.
    """
    make_settings = settings or (lambda: _defaults(group, kind))
    return [Outcome(group, kind, text, _problem(check)) for text, check in _CONTRACTS[group](kind, make_settings)]


def _defaults(group: str, kind: str) -> Any:
    # `root` is the only key without a default, and no file is read when settings are made.
    return schema_of(group, kind)(**({"root": "."} if group == "data" else {}), name=kind)


def _problem(check: Callable[[], None]) -> str:
    try:
        check()
    except AssertionError as error:
        return first_line(error)
    except Exception as error:  # any exception of the plugin is reported in the table
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


# --- projectors -------------------------------------------------------------------------------------------------------


class _ProjectorContracts:
    """Contracts of one kind of projector.

    Args:
        kind: Registered kind.
        settings: Function that returns the settings.
    """

    def __init__(self, kind: str, settings: Settings) -> None:
        self.kind, self.settings = kind, settings

    def __call__(self) -> Iterator[Contract]:
        yield "its settings have defaults, and it is built from them", lambda: void(self.build())
        yield "num_tokens is what forward gives, for several F and P", self.check_tokens
        yield "a gradient reaches every trainable weight", self.check_gradients
        yield "clips of a batch do not see each other", self.check_batch
        # Each line is a row of the table that `vlmcap check-plugin` prints.
        yield "equal input gives equal output in evaluation", self.check_repeat
        yield "its state_dict saves and loads to the same output", self.check_state
        yield "it takes float16 and bfloat16 features", self.check_half
        yield "it runs on the meta device, as the plan does", self.check_meta

    def build(self, seed: int = 0) -> Projector:
        """Builds the projector with weights from a seed."""
        import torch

        from vlmcap.models.projectors import ProjectorSizes, build_projector

        config: ProjectorConfig = self.settings()
        # The caller's random state stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Vision width 32 and language width 48 differ, so that a projector that mixes them up fails.
            return build_projector(config, ProjectorSizes(32, 48, _GRIDS[0], _FRAMES[0], _PROMPT)).eval()

    def run(
        self, projector: Projector, num_clips: int = 2, num_frames: int = _FRAMES[0], grid: tuple[int, int] = _GRIDS[0]
    ) -> Tensor:
        """Returns the visual tokens of clips of noise, which is the same in every call."""
        import torch

        # A projector without parameters, such as plain pooling, runs on the CPU.
        device = (
            next(projector.parameters()).device if any(True for _ in projector.parameters()) else torch.device("cpu")
        )
        # (B, F, P, Dv)
        features = noise(num_clips, num_frames, math.prod(grid), projector.sizes.in_dim).to(device)
        tokens: Tensor = projector(features, grid=grid, prompt=noise(_PROMPT, projector.sizes.out_dim).to(device))
        return tokens

    def check_tokens(self) -> None:
        """Checks that the output is (B, V, Dl) with the stated V, and finite."""
        projector = self.build()
        for num_frames in _FRAMES:
            for grid in _GRIDS:
                try:
                    stated = projector.num_tokens(num_frames, math.prod(grid), grid)
                except UserError as refusal:
                    # A projector may refuse other grids, such as those that its shuffle does not divide, but not the
                    # encoder's own.
                    assert grid != _GRIDS[0], f"it refuses its own grid: {first_line(refusal)}"
                    continue
                tokens, what = self.run(projector, 2, num_frames, grid), f"F={num_frames}, P={grid[0]} × {grid[1]}"
                expected = (2, stated, projector.sizes.out_dim)
                assert tuple(tokens.shape) == expected, (
                    f"{what}: forward gives {tuple(tokens.shape)}, num_tokens states {expected}"
                )
                assert bool(tokens.isfinite().all()), f"{what}: the output is not finite"

    def check_gradients(self) -> None:
        """Checks that every trainable weight has a finite gradient that is not zero."""
        projector = self.build().train()
        # The square has another gradient for each output; a plain sum is blind to a norm as the last layer.
        self.run(projector).square().sum().backward()
        weights = {name: weight for name, weight in projector.named_parameters() if weight.requires_grad}
        dead = [name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()]
        assert not dead, f"no gradient reaches {', '.join(dead)}"
        wild = [
            name for name, weight in weights.items() if weight.grad is not None and not weight.grad.isfinite().all()
        ]
        assert not wild, f"the gradient of {', '.join(wild)} is not finite"

    def check_batch(self) -> None:
        """Checks that the tokens of a clip do not depend on other clips of the batch, also in training."""
        # 1. In evaluation: the tokens of a clip are the same alone and beside others.
        projector = self.build()
        error = difference(self.run(projector, 3)[:1], self.run(projector, 1))
        assert error < 1e-4, f"the first clip of three differs by {error:.1e} from the same clip alone"
        # 2. In training: the first clip's tokens have no gradient to the others. Batch norm would give one.
        features = noise(3, _FRAMES[0], math.prod(_GRIDS[0]), projector.sizes.in_dim).requires_grad_()
        projector.train()(features, prompt=noise(_PROMPT, projector.sizes.out_dim))[0].square().sum().backward()
        is_alone = features.grad is not None and not features.grad[1:].any()
        assert is_alone, "in training the first clip's tokens depend on the others; normalise each clip by itself"

    def check_repeat(self) -> None:
        """Checks that nothing is random after `eval()`."""
        projector = self.build()
        assert bool((self.run(projector) == self.run(projector)).all()), (
            "two calls differ; use dropout and noise only in training"
        )

    def check_state(self) -> None:
        """Checks that the state dict is complete: another projector with the same weights gives the same output."""
        # The two seeds give different weights, so that equal outputs can only come from the state dict.
        first, second = self.build(0), self.build(1)
        second.load_state_dict(first.state_dict())
        error = difference(self.run(first), self.run(second))
        assert error < 1e-6, (
            f"the outputs differ by {error:.1e}; register every weight as a parameter, and every table as a buffer"
        )

    def check_half(self) -> None:
        """Checks that half precision features give float32 tokens."""
        import torch

        projector = self.build()
        for dtype in (torch.float16, torch.bfloat16):
            features = noise(2, _FRAMES[0], math.prod(_GRIDS[0]), projector.sizes.in_dim).to(dtype)
            # As in a training step with half precision, where the projector casts at its edges.
            with torch.autocast("cpu", dtype):
                tokens = projector(features, prompt=noise(_PROMPT, projector.sizes.out_dim).to(dtype))
            assert tokens.dtype == torch.float32, f"{dtype} features give {tokens.dtype}"
            assert bool(tokens.isfinite().all()), f"{dtype} features give tokens that are not finite"

    def check_meta(self) -> None:
        """Checks that the projector runs on the meta device."""
        import torch

        # Tensors that the projector makes inside `forward` without a device also land on meta here.
        with torch.device("meta"):
            projector = self.build()
            features = torch.empty(1, _FRAMES[0], math.prod(_GRIDS[0]), projector.sizes.in_dim)
            tokens = projector(features, prompt=torch.empty(_PROMPT, projector.sizes.out_dim))
        assert tokens.is_meta, "it leaves the meta device; make tensors on the device of its input"


# --- the other kinds --------------------------------------------------------------------------------------------------


class _EncoderContracts:
    """Contracts of one kind of encoder with random weights.

    Args:
        kind: Registered kind.
        settings: Function that returns the settings.
    """

    def __init__(self, kind: str, settings: Settings) -> None:
        self.kind, self.settings = kind, settings

    def __call__(self) -> Iterator[Contract]:
        yield "its settings have defaults, and it is built without a folder", lambda: void(self.build())
        yield "it gives the stated grid and width", self.check_shape
        yield "clips of a batch do not see each other", self.check_batch
        yield "equal frames give equal features, at each load", self.check_repeat
        yield "its transform makes what it takes, and can be sent to data workers", self.check_transform
        yield "it runs in bfloat16", self.check_half
        yield "it is built on the meta device, as the plan does", self.check_meta

    def build(self, seed: int = 0) -> VisionEncoder:
        """Builds the encoder with weights from a seed."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder: VisionEncoder = maker_of("encoder", self.kind)(self.settings(), None)
        return encoder.eval()

    def run(self, encoder: VisionEncoder, num_clips: int = 2) -> Tensor:
        """Returns the features of clips with two frames of noise, which is the same in every call."""
        import torch

        size = cast(Any, encoder.transform).image_size
        # Noise in (0, 1) as uint8 frames, (B, F, 3, H, W).
        frames = (noise(num_clips, 2, 3, size, size).sigmoid() * 255).to(torch.uint8)
        with torch.no_grad():
            return cast("Tensor", encoder(frames))

    def check_shape(self) -> None:
        """Checks that the output is (B, F, P, Dv) with the stated P and Dv."""
        encoder = self.build()
        shape, expected = tuple(self.run(encoder).shape), (2, 2, encoder.num_patches, encoder.embed_dim)
        assert shape == expected, f"forward gives {shape}, grid and embed_dim state {expected}"

    def check_batch(self) -> None:
        """Checks that the features of a clip do not depend on other clips of the batch."""
        encoder = self.build()
        error = difference(self.run(encoder, 3)[:1], self.run(encoder, 1))
        assert error < 1e-4, f"the first clip of three differs by {error:.1e} from the same clip alone"

    def check_repeat(self) -> None:
        """Checks that features can be stored, because they are the same in every call and after every load."""
        encoder = self.build()
        assert bool((self.run(encoder) == self.run(encoder)).all()), "two calls differ, so features cannot be stored"
        # Without a checkpoint, the same weights must come out of every load, as the encoder is frozen and never saved.
        if not self.settings().checkpoint:
            # Another seed before the load must not change them.
            is_fixed = bool((self.run(encoder) == self.run(self.build(1))).all())
            assert is_fixed, (
                "its weights are random after every load, but no checkpoint saves them; read them from "
                "encoder.checkpoint"
            )

    def check_transform(self) -> None:
        """Checks that the transform turns frames of any size into frames of the encoder's size."""
        from multiprocessing.reduction import ForkingPickler

        import torch

        transform: Any = self.build().transform
        ForkingPickler.dumps(transform)  # for the data workers
        # 90 × 160 is neither square nor the size of the encoder.
        frames, size = transform(torch.zeros(2, 3, 90, 160, dtype=torch.uint8)), transform.image_size
        actual = (tuple(frames.shape), frames.dtype)
        assert actual == ((2, 3, size, size), torch.uint8), f"it gives {actual}, expected uint8 of {size} × {size}"

    def check_half(self) -> None:
        """Checks that the encoder runs with frozen weights in bfloat16."""
        import torch

        features = self.run(self.build().to(torch.bfloat16))
        assert bool(features.isfinite().all()), "features in bfloat16 are not finite"

    def check_meta(self) -> None:
        """Checks that the encoder is built on the meta device."""
        import torch

        with torch.device("meta"):
            encoder = self.build()
        assert all(weight.is_meta for weight in encoder.parameters()), "it reads weights although there is no folder"


def _metric_contracts(name: str, _: Settings) -> Iterator[Contract]:
    from vlmcap.metrics.user_metrics import user_scores

    # The cases that break metrics: an empty caption, and clips with one and with two references.
    texts = ["파도가 치는 바다.", "", "산 위의 구름."]
    references = [["바다에 파도가 친다."], ["밤.", "어두운 밤."], ["구름 낀 산."]]

    def check_value() -> None:
        score = user_scores(texts, references)[name]
        assert math.isfinite(score), f"it gives {score}"

    def check_repeat() -> None:
        assert user_scores(texts, references)[name] == user_scores(texts, references)[name], "two calls differ"

    def check_order() -> None:
        error = abs(user_scores(texts, references)[name] - user_scores(texts[::-1], references[::-1])[name])
        assert error < 1e-9, f"clips in another order differ by {error:.1e}"

    yield "it gives a finite number, or one per clip, for several references and an empty caption", check_value
    # The order of the table: the value first, as the other checks need one.
    yield "equal captions give equal scores", check_repeat
    yield "the order of clips makes no difference", check_order


def _format_contracts(_: str, made: Settings) -> Iterator[Contract]:
    from vlmcap.data.formats import read_records
    from vlmcap.data.formats.record import Record
    from vlmcap.types import Skipped

    def check_empty() -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = dataclasses.replace(made(), root=folder)
            try:
                entries: list[object] = [*read_records(settings, None)]
            except UserError as error:
                assert "\n" not in str(error), "its UserError is longer than one line"
                return
        wrong = [type(entry).__name__ for entry in entries if not isinstance(entry, Record | Skipped)]
        assert not wrong, f"it gives {wrong[0]}, expected Record or Skipped"

    yield "its settings have defaults beside root", lambda: void(made())
    yield "an empty folder gives nothing, or a UserError of one line", check_empty


def _llm_contracts(_: str, made: Settings) -> Iterator[Contract]:
    yield "its settings have defaults", lambda: void(made())


def noise(*shape: int) -> Tensor:
    """Returns normal noise that is the same in every call; a larger batch starts with the clips of a smaller one."""
    import torch

    # The generator is on the CPU and is named, so that `torch.device("meta")` around the call changes nothing.
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def difference(tokens: Tensor, others: Tensor) -> float:
    """Returns the largest absolute difference."""
    return float((tokens - others).detach().abs().max())


def void(_: object) -> None:
    """Discards a result, where only the call matters."""


_CONTRACTS: dict[str, Callable[[str, Settings], Iterator[Contract]]] = {
    "projector": lambda kind, made: _ProjectorContracts(kind, made)(),
    "encoder": lambda kind, made: _EncoderContracts(kind, made)(),
    "llm": _llm_contracts,
    "metric": _metric_contracts,
    "data": _format_contracts,
}
