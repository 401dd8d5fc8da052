"""How many directions patch features use, and whether features of near patches are more similar than those of far ones.

Legend: N patches of all frames, P patches per frame (row-major over its grid h × w), Dv vision width, R prefix tokens
(CLS, registers).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_OUTLIER = 3.0  # times the median norm; the outliers of Darcet et al. have about ten times that of others
_MAX_PAIRS = 1 << 28  # pairs of patches over all frames


@dataclass(frozen=True, slots=True)
class FrameFeatures:
    """Features of one frame.

    Attributes:
        patches: (P, Dv).
        grid: (h, w).
        prefix: (R, Dv), or None where the encoder has no prefix tokens.
    """

    patches: Tensor
    grid: tuple[int, int]
    prefix: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Locality:
    """Similarity against distance, as means over pairs of patches of a frame.

    Distances are rounded to whole patches.

    Attributes:
        distances: (K,), mean Euclidean distance of the pairs in patches; the first is 0, each patch with itself.
        similarity: (K,), mean cosine similarity.
        correlation: (K,), mean product of centred features over their mean square; 1 at distance 0.
    """

    distances: tuple[float, ...]
    similarity: tuple[float, ...]
    correlation: tuple[float, ...]

    @property
    def length(self) -> float | None:
        """Correlation length in patches, the distance at which the correlation is 1/e.

        None where the correlation is larger over the whole frame.
        """
        level = math.exp(-1)
        pairs = list(zip(self.distances, self.correlation, strict=True))
        for (near, high), (far, low) in itertools.pairwise(pairs):
            if low <= level:
                # Exact for an exponential; a correlation that has fallen below 0 has no logarithm.
                share = math.log(high / level) / math.log(high / low) if low > 0 else (high - level) / (high - low)
                return near + share * (far - near)
        return None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Figures of one encoder or of one of its layers.

    Attributes:
        num_frames: Number of frames.
        num_tokens: Patches in the singular values.
        width: Dv.
        values: Singular values of the centred patches, largest first.
        locality: Similarity against distance over the frames.
        outlier_share: Share of patches with a norm above three times the median.
        outlier_energy: Their share of the sum of squared norms.
        prefix_norm: Mean norm of the first prefix token (CLS) over the median of the patches; None without prefix
            tokens.
    """

    num_frames: int
    num_tokens: int
    width: int
    values: Tensor
    locality: Locality
    outlier_share: float
    outlier_energy: float
    prefix_norm: float | None

    @property
    def effective_rank(self) -> float:
        """See the function `effective_rank`."""
        return effective_rank(self.values)

    @property
    def participation_ratio(self) -> float:
        """See the function `participation_ratio`."""
        return participation_ratio(self.values)

    def figures(self) -> dict[str, float | int | None]:
        """Returns the numbers of a table."""
        similarity = self.locality.similarity
        return {
            "width": self.width,
            "frames": self.num_frames,
            "tokens": self.num_tokens,
            "effective_rank": self.effective_rank,
            "participation_ratio": self.participation_ratio,
            "directions_90": num_directions(self.values, 0.9),
            "similarity_neighbour": similarity[1] if len(similarity) > 1 else None,
            "similarity_mean": sum(similarity[1:]) / (len(similarity) - 1) if len(similarity) > 1 else None,
            "correlation_length": self.locality.length,
            "outlier_share": self.outlier_share,
            "outlier_energy": self.outlier_energy,
            "cls_norm": self.prefix_norm,
        }


def singular_values(features: Tensor, *, is_centred: bool = True) -> Tensor:
    """Returns the singular values in float64 (min(N, Dv),), largest first, from the smaller of the two Gram matrices.

    Values below 1e-8 of the largest are rounding errors.

    Args:
        features: (N, Dv).
        is_centred: Whether the mean is subtracted, which is otherwise one large value.
    """
    values = features.double()
    if is_centred:
        values = values - values.mean(0)
    gram = values.T @ values if values.shape[0] > values.shape[1] else values @ values.T
    # Eigenvalues ascend, and rounding may make the smallest negative.
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def effective_rank(values: Tensor) -> float:
    """Returns the exponential of the entropy of the normalised singular values, from 1 to their number; 0 if all are 0.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    if not values.any():
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def participation_ratio(values: Tensor) -> float:
    """Returns (Σλ)² / Σλ² of the variances λ, the squared singular values, from 1 to their number; 0 if all are 0.

    It counts large directions, where the effective rank also counts the many small ones.
    """
    if not values.any():
        return 0.0
    variances = values**2
    return float(variances.sum() ** 2 / (variances**2).sum())


def num_directions(values: Tensor, share: float) -> int:
    """Returns the fewest directions that hold `share` of the variance."""
    variances = values**2
    if not variances.any():
        return 0
    # The margin is for rounding: a sum that is equal to the share has reached it.
    return int((variances.cumsum(0) / variances.sum() < share - 1e-12).sum()) + 1


def locality(frames: Sequence[FrameFeatures], mean: Tensor) -> Locality:
    """Returns similarity against distance.

    Args:
        frames: Frames, whose pairs of patches have equal weight.
        mean: (Dv,), mean of all features, which is subtracted for the correlation.
    """
    sums: dict[str, Tensor] = {}
    for frame in frames:
        distance = patch_distances(frame.grid)
        patches = frame.patches.double()
        unit, centred = F.normalize(patches, dim=-1), patches - mean.double()
        # (P, P) each: a value for every pair of patches of the frame.
        of_pairs = {
            "distance": distance,
            "similarity": unit @ unit.T,
            "product": centred @ centred.T,
            "count": torch.ones_like(distance),
        }
        # (P * P,): the whole distance of each pair
        bins = distance.round().long().flatten()
        for name, values in of_pairs.items():
            binned = torch.bincount(bins, weights=values.flatten())  # (K,), a sum per whole distance
            earlier = sums.get(name, binned[:0])
            size = max(len(earlier), len(binned))  # frames of other grids have other largest distances
            sums[name] = F.pad(earlier, (0, size - len(earlier))) + F.pad(binned, (0, size - len(binned)))
    count = sums["count"]
    has_pairs = count > 0
    means = {name: (sums[name] / count.clamp_min(1))[has_pairs] for name in ("distance", "similarity", "product")}
    variance = means["product"][0].clamp_min(torch.finfo(torch.float64).tiny)
    columns = (means["distance"], means["similarity"], means["product"] / variance)
    return Locality(*(tuple(column.tolist()) for column in columns))


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Returns the Euclidean distance of each pair of patches in patches, float64 (P, P)."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]).double(), torch.arange(grid[1]).double(), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], 1)  # (P, 2)
    # Exact; the default for large grids subtracts squares, so that a patch has a distance from itself.
    return torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")


def similarity_maps(frame: FrameFeatures, queries: Sequence[int]) -> Tensor:
    """Returns the cosine similarity of some patches with all of their frame, (Q, h, w)."""
    unit = F.normalize(frame.patches.float(), dim=-1)
    return (unit[list(queries)] @ unit.T).unflatten(1, frame.grid)  # (Q, P) -> (Q, h, w)


def measure_spectrum(frames: Sequence[FrameFeatures], *, max_tokens: int, seed: int = 0) -> Spectrum:
    """Returns the figures of the features of some frames.

    Args:
        frames: At least one frame.
        max_tokens: Most patches, drawn from all, in the singular values.
        seed: Seed of the draw.
    """
    tokens = torch.cat([frame.patches for frame in frames]).float().cpu()  # (N, Dv)
    # A sample without repetition, the same for every encoder with as many patches.
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:max_tokens]
    norms = tokens.double().norm(dim=-1)
    median = norms.median()
    is_outlier = norms > _OUTLIER * median
    prefixes = [
        # The first prefix token is CLS where there is one.
        float(frame.prefix[0].double().norm())
        for frame in frames
        if frame.prefix is not None and len(frame.prefix)
    ]
    # As many frames as the limit on pairs allows, at least one.
    pairs = max(len(frame.patches) for frame in frames) ** 2
    near = [FrameFeatures(frame.patches.cpu(), frame.grid) for frame in frames[: max(1, _MAX_PAIRS // pairs)]]
    return Spectrum(
        num_frames=len(frames),
        num_tokens=len(drawn),
        width=tokens.shape[1],
        values=singular_values(tokens[drawn]),
        locality=locality(near, tokens.double().mean(0)),
        outlier_share=float(is_outlier.double().mean()),
        outlier_energy=float(
            (norms[is_outlier] ** 2).sum() / (norms**2).sum().clamp_min(torch.finfo(torch.float64).tiny)
        ),
        prefix_norm=sum(prefixes) / len(prefixes) / float(median) if prefixes and median > 0 else None,
    )
