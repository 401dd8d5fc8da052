"""A data set of the features of two joined encoders, which are stored apart."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import Dataset

from vlmcap.data.features.feature_dataset import FeatureDataset
from vlmcap.models.encoders.joined import join_features
from vlmcap.models.projectors.base import Grid
from vlmcap.types import Sample, Skipped


class JoinedFeatureDataset(Dataset[Sample | Skipped]):
    """Joins the stored features of a clip as the encoder joins those of its frames.

    Args:
        first: Features of the first encoder.
        second: Features of the second encoder, for the same clips.
        grids: Patch grids of both.
    """

    def __init__(self, first: FeatureDataset, second: FeatureDataset, grids: tuple[Grid, Grid]) -> None:
        self.first, self.second, self.grids = first, second, grids
        self.clips = first.clips

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | Skipped:
        first, second = self.first[key], self.second[key]
        if isinstance(first, Skipped):
            return first
        if isinstance(second, Skipped):
            return second
        assert first.features is not None and second.features is not None
        return replace(first, features=join_features(first.features, second.features, self.grids))
