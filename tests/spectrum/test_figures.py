"""Figures of features whose spectrum and correlation are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlmcap.spectrum.figures import (
    FrameFeatures,
    effective_rank,
    locality,
    measure_spectrum,
    num_directions,
    participation_ratio,
    patch_distances,
    similarity_maps,
    singular_values,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_orthonormal_features_use_every_direction() -> None:
    values = singular_values(torch.eye(12), is_centred=False)
    assert effective_rank(values) == pytest.approx(12)
    assert participation_ratio(values) == pytest.approx(12)
    assert num_directions(values, 0.5) == 6
    centred = singular_values(torch.eye(12))  # the mean takes one away
    assert effective_rank(centred) == pytest.approx(11, abs=1e-4)
    assert participation_ratio(centred) == pytest.approx(11)


def test_features_along_one_line_use_one() -> None:
    values = singular_values(random(50, 1) * random(1, 8, seed=1))
    assert effective_rank(values) == pytest.approx(1, abs=1e-4)
    assert participation_ratio(values) == pytest.approx(1)
    assert num_directions(values, 0.999) == 1
    still = singular_values(torch.ones(5, 3))
    assert (effective_rank(still), participation_ratio(still), num_directions(still, 0.9)) == (0, 0, 0)


def test_known_values_give_known_ranks() -> None:
    values = torch.tensor([3.0, 1.0])
    assert effective_rank(values) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert participation_ratio(values) == pytest.approx(100 / 82)


@pytest.mark.parametrize("shape", [(200, 20), (20, 200), (40, 40)])
def test_values_are_those_of_a_plain_decomposition(shape: tuple[int, int]) -> None:
    features = random(*shape) @ torch.diag(torch.logspace(0, -3, shape[1])) + 5
    expected = torch.linalg.svdvals((features - features.mean(0)).double())
    assert torch.allclose(singular_values(features), expected, atol=1e-5 * float(expected[0]))
    raw = torch.linalg.svdvals(features.double())
    assert torch.allclose(singular_values(features, is_centred=False), raw, atol=1e-5 * float(raw[0]))


@pytest.mark.parametrize("length", [1.5, 4.0])
def test_an_exponential_correlation_has_its_length(length: float) -> None:
    row = (-patch_distances((1, 24)) / length).exp()
    found = locality([FrameFeatures(torch.linalg.cholesky(row), (1, 24))], torch.zeros(24))
    assert found.distances == pytest.approx(range(24))
    assert found.similarity == pytest.approx([math.exp(-distance / length) for distance in range(24)])
    assert found.correlation == pytest.approx(found.similarity)
    assert found.length == pytest.approx(length)
    square = (-patch_distances((9, 7)) / length).exp()
    found = locality([FrameFeatures(torch.linalg.cholesky(square), (9, 7))], torch.zeros(63))
    assert found.length == pytest.approx(length, rel=0.05), "distances are rounded in two dimensions"


def test_a_mean_that_all_share_is_no_correlation() -> None:
    features = random(400, 64) + 10
    frame = FrameFeatures(features, (20, 20))
    found = locality([frame], features.mean(0))
    assert found.similarity[1] > 0.98, "as the mean is most of each"
    assert abs(found.correlation[1]) < 0.02
    assert found.length is not None and found.length < 1


def test_features_that_stay_correlated_have_no_length() -> None:
    ones = torch.ones(16, 4)
    assert locality([FrameFeatures(ones, (4, 4))], torch.zeros(4)).length is None
    halves = torch.cat([ones[:8], -ones[:8]])
    assert locality([FrameFeatures(halves, (1, 16))], torch.zeros(4)).length is not None


def test_frames_of_different_grids_go_together() -> None:
    first, second = FrameFeatures(random(6, 5), (2, 3)), FrameFeatures(random(20, 5, seed=1), (4, 5))
    both = locality([first, second], torch.zeros(5))
    alone = [locality([frame], torch.zeros(5)) for frame in (first, second)]
    pairs = [int((patch_distances(frame.grid).round() == 1).sum()) for frame in (first, second)]
    expected = sum(one.similarity[1] * count for one, count in zip(alone, pairs, strict=True)) / sum(pairs)
    assert both.similarity[1] == pytest.approx(expected)
    assert len(both.distances) == len(alone[1].distances)


def test_outliers_and_the_cls_token_are_reported() -> None:
    patches = torch.nn.functional.normalize(random(100, 16), dim=-1)
    patches[:5] *= 10
    frames = [FrameFeatures(patches, (10, 10), 4 * torch.nn.functional.normalize(random(2, 16, seed=3), dim=-1))]
    found = measure_spectrum(frames, max_tokens=60)
    assert found.outlier_share == pytest.approx(0.05)
    assert found.outlier_energy == pytest.approx(500 / 595)
    assert found.prefix_norm == pytest.approx(4, rel=1e-5)
    assert found.num_tokens == len(found.values) + 44 == 60
    without = measure_spectrum([FrameFeatures(patches[5:], (5, 19))], max_tokens=1000)
    assert (without.num_tokens, without.outlier_share, without.prefix_norm) == (95, 0, None)


def test_a_map_is_one_at_its_own_patch() -> None:
    maps = similarity_maps(FrameFeatures(random(12, 6), (3, 4)), [0, 7])
    assert maps.shape == (2, 3, 4)
    assert float(maps[0, 0, 0]) == pytest.approx(1) and float(maps[1, 1, 3]) == pytest.approx(1)
    assert maps.max() <= 1 + 1e-6
