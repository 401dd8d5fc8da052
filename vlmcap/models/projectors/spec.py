"""All settings and sizes of a projector, and how many tokens come of them; nothing is built for it.

Legend: F frames (tiles count), P patches a frame on a grid h × w, Dv vision width, V visual tokens a clip, Dl language width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmcap.errors import UserError

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ProjectorSpec:
    """Settings and sizes of a projector.

    Attributes:
        kind: "linear", "mlp", "cross_attention", "perceiver", "c_abstractor" or "pixel_shuffle".
        in_dim: Dv.
        out_dim: Dl.
        grid: The encoder's own (h, w).
        num_frames: The most frames of a clip.
        depth: Linear layers of mlp and pixel_shuffle.
        use_layer_norm: LayerNorm in front of linear and mlp.
        hidden_dim: Inner width of attention and convolutions; None is Dv, rounded up to even heads where there are any.
        num_layers: Of cross_attention and perceiver; convolution blocks on each side of the pooling in c_abstractor.
        num_heads: Of all attention.
        queries: What attends in cross_attention: "learned" queries a frame, or the "prompt" a clip.
        num_queries: Learned queries a frame (cross_attention), latents a clip (perceiver), tokens a frame (c_abstractor, a square).
        num_prompt_tokens: Length of the question, for queries=prompt.
        shuffle: Patches a side that pixel_shuffle joins.
        reducer: "none", "pool", "resample", "merge" or "saliency", in front.
        pool_size: Patches a side that pool averages.
        resample_size: Side of the grid that resample gives.
        keep_ratio: Share of tokens that merge keeps of a frame, saliency of a clip.
        frame_stack: Consecutive frames joined in one token.
        temporal: "none", "position" (in front), "attention" or "local_global" (behind).
        window: Tokens that local_global sees on each side.
        num_global: Global tokens of local_global.
    """

    kind: str
    in_dim: int
    out_dim: int
    grid: Grid
    num_frames: int
    depth: int = 2
    use_layer_norm: bool = False
    hidden_dim: int | None = None
    num_layers: int = 2
    num_heads: int = 8
    queries: str = "learned"
    num_queries: int = 64
    num_prompt_tokens: int | None = None
    shuffle: int = 2
    reducer: str = "none"
    pool_size: int = 2
    resample_size: int = 12
    keep_ratio: float = 0.25
    frame_stack: int = 1
    temporal: str = "none"
    window: int = 256
    num_global: int = 8

    def check(self) -> None:
        """Checks that there can be such a projector.

        Raises:
            UserError: A setting is out of range, two of them exclude each other, or pixel_shuffle cannot divide the grid.
        """
        for check in (_check_ranges, _check_heads, _check_queries, _check_reducer, _check_time):
            check(self)
        self.num_tokens(self.num_frames)

    @property
    def has_heads(self) -> bool:
        """Whether any part attends."""
        return self.kind in ("cross_attention", "perceiver") or self.temporal in ("attention", "local_global")

    @property
    def chooses_tokens(self) -> bool:
        """Whether the reducer leaves tokens that stand on no grid."""
        return self.reducer in ("merge", "saliency")

    @property
    def reads_clip(self) -> bool:
        """Whether a fixed set of tokens reads the whole clip, so that none belongs to a frame."""
        return self.kind == "perceiver" or (self.kind == "cross_attention" and self.queries == "prompt")

    @property
    def inner_dim(self) -> int:
        """Width of attention and convolutions."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        step = 2 * self.num_heads if self.has_heads else 1  # rotary embeddings turn pairs
        return math.ceil(self.in_dim / step) * step

    @property
    def stacked_dim(self) -> int:
        """Width of a token in front of the projection."""
        return self.in_dim * self.frame_stack

    def num_steps(self, num_frames: int) -> int:
        """Frames, or stacks of frames, that the projection sees; the last stack of a short clip may be filled up."""
        return math.ceil(num_frames / self.frame_stack)

    def reduced_grid(self, grid: Grid) -> Grid:
        """Grid of a frame in front of the projection; merge and saliency choose from it later."""
        if self.reducer == "pool":
            return math.ceil(grid[0] / self.pool_size), math.ceil(grid[1] / self.pool_size)
        return (self.resample_size, self.resample_size) if self.reducer == "resample" else grid

    def out_grid(self, grid: Grid) -> Grid:
        """Places of a frame behind the projection, where frames have any.

        Raises:
            UserError: pixel_shuffle cannot divide the grid.
        """
        if self.kind == "cross_attention":
            return 1, self.num_queries
        if self.kind == "c_abstractor":
            return math.isqrt(self.num_queries), math.isqrt(self.num_queries)
        rows, columns = self.reduced_grid(grid)
        if self.kind != "pixel_shuffle":
            return rows, columns
        if rows % self.shuffle or columns % self.shuffle:
            raise UserError(_indivisible(self, grid))
        return rows // self.shuffle, columns // self.shuffle

    def num_tokens(self, num_frames: int, grid: Grid | None = None) -> int:
        """V of a clip.

        Args:
            num_frames: F of the clip.
            grid: Its (h, w); None is the encoder's own.

        Raises:
            UserError: pixel_shuffle cannot divide the grid.
        """
        if self.kind == "perceiver":
            return self.num_queries
        if self.reads_clip:
            assert self.num_prompt_tokens is not None
            return self.num_prompt_tokens
        places = math.prod(self.out_grid(grid or self.grid))
        if self.chooses_tokens and self.kind in ("linear", "mlp"):
            return num_chosen(self.reducer, self.keep_ratio, num_frames, places)
        return self.num_steps(num_frames) * places


def num_chosen(reducer: str, keep_ratio: float, num_frames: int, num_patches: int) -> int:
    """Tokens of a clip that merge or saliency leaves: a share of each frame, or of the clip with at least one a frame."""
    if reducer == "merge":
        return num_frames * _share(keep_ratio, num_patches)
    return max(num_frames, _share(keep_ratio, num_frames * num_patches))


def _share(ratio: float, count: int) -> int:
    return math.ceil(ratio * count - 1e-9)  # 0.07 · 100 is 7.000000000000001


_COUNTS = (
    "depth", "num_layers", "num_heads", "num_queries", "shuffle", "pool_size", "resample_size", "frame_stack", "window"
)  # fmt: skip


def _check_ranges(spec: ProjectorSpec) -> None:
    for name in _COUNTS:
        if getattr(spec, name) < 1:
            raise UserError(f"projector.{name} must be at least 1, not {getattr(spec, name)}")
    if spec.num_global < 0:
        raise UserError(f"projector.num_global must not be negative, not {spec.num_global}")
    if not 0 < spec.keep_ratio <= 1:
        raise UserError(f"projector.keep_ratio must be above 0 and at most 1, not {spec.keep_ratio}")
    if spec.hidden_dim is not None and spec.hidden_dim < 1:
        raise UserError(f"projector.hidden_dim must be at least 1, or null for the encoder's width, not {spec.hidden_dim}")


def _check_heads(spec: ProjectorSpec) -> None:
    is_rotary = spec.temporal == "local_global"
    step = spec.num_heads * (2 if is_rotary else 1)
    if not spec.has_heads or spec.inner_dim % step == 0:
        return
    wanted = "twice projector.num_heads, as temporal=local_global needs heads of even width" if is_rotary else "projector.num_heads"
    raise UserError(
        f"projector.hidden_dim={spec.hidden_dim} is no multiple of {wanted} ({step}); "
        f"set projector.hidden_dim={math.ceil(spec.inner_dim / step) * step} or null"
    )


def _check_queries(spec: ProjectorSpec) -> None:
    if spec.queries == "prompt":
        if spec.kind != "cross_attention":
            raise UserError(f"projector.queries=prompt is for projector=cross_attention, not {spec.kind}; set projector.queries=learned")
        if not spec.num_prompt_tokens:
            raise UserError("projector.queries=prompt needs a question, and there is none; set llm.prompt, or projector.queries=learned")
    if spec.kind == "c_abstractor" and math.isqrt(spec.num_queries) ** 2 != spec.num_queries:
        raise UserError(
            f"projector=c_abstractor gives a square of tokens a frame, which projector.num_queries={spec.num_queries} is not; "
            f"set it to {round(math.sqrt(spec.num_queries)) ** 2}"
        )


def _check_reducer(spec: ProjectorSpec) -> None:
    if not spec.chooses_tokens:
        return
    if spec.frame_stack > 1:
        raise UserError(
            f"projector.reducer={spec.reducer} keeps other places in each frame, so frames cannot be stacked behind it; "
            "set projector.frame_stack=1, or projector.reducer=pool"
        )
    if spec.kind in ("c_abstractor", "pixel_shuffle"):
        raise UserError(
            f"projector={spec.kind} needs the grid of patches that projector.reducer={spec.reducer} takes apart; "
            "set projector.reducer to none, pool or resample, or choose another projector"
        )
    if spec.temporal == "attention":
        raise UserError(
            f"projector.temporal=attention follows one place through time, and projector.reducer={spec.reducer} keeps other places "
            "in each frame; set projector.temporal to none, position or local_global"
        )


def _check_time(spec: ProjectorSpec) -> None:
    if spec.num_frames % spec.frame_stack:
        raise UserError(
            f"projector.frame_stack={spec.frame_stack} does not divide data.num_frames={spec.num_frames}; set one to a divisor of the other"
        )
    if spec.temporal == "attention" and spec.reads_clip:
        tokens = "projector=perceiver" if spec.kind == "perceiver" else "projector.queries=prompt"
        raise UserError(
            f"projector.temporal=attention follows one place through time, but the tokens of {tokens} belong to the whole clip; "
            "set projector.temporal to none, position or local_global"
        )


def _indivisible(spec: ProjectorSpec, grid: Grid) -> str:
    """Why pixel_shuffle cannot divide a grid, and the nearest one that it can."""
    factor = f"projector.shuffle={spec.shuffle} does not divide the grid"
    if spec.reducer == "resample":
        size = _nearest(spec.resample_size, spec.shuffle)
        return f"{factor} of {spec.resample_size} × {spec.resample_size} patches; set projector.resample_size={size}"
    pool = spec.pool_size if spec.reducer == "pool" else 1
    rows, columns = (_nearest(side, spec.shuffle, pool) for side in grid)
    behind = f", pooled {pool} × {pool}" if pool > 1 else ""
    return (
        f"{factor} of {grid[0]} × {grid[1]} patches{behind}; set encoder.image_size to the size of {rows} × {columns} patches, "
        "or choose another projector"
    )


def _nearest(side: int, factor: int, pool: int = 1) -> int:
    fitting = (n for n in range(1, side + 2 * factor * pool) if math.ceil(n / pool) % factor == 0)
    return min(fitting, key=lambda n: (abs(n - side), -n))
