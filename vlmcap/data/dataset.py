"""Map-style data sets: clips decoded on the fly, or their cached features.

Legend: F frames, P patches a frame, Dv vision width, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.data import Dataset

from vlmcap.data.feature_cache import FeatureCache
from vlmcap.data.video import VideoError, decode_frames
from vlmcap.errors import UserError
from vlmcap.types import Clip, GridTHW, Sample, Skipped


class ClipDataset(Dataset[Sample | Skipped]):
    """Clips with frames, resized for the encoder; a video that cannot be read gives a `Skipped`, never an exception.

    Args:
        clips: The clips, in the order of the indices.
        num_frames: F, frames sampled from each clip.
        frame_transform: uint8 (F, 3, H, W) of any size -> uint8 as the encoder wants it; picklable for data workers.
        grid_of: F, H and W of decoded frames -> the clip's size in patches, or None where it is the encoder's own; picklable too.
        decode_timeout_s: Seconds that one clip may take.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        num_frames: int,
        frame_transform: Callable[[Tensor], Tensor],
        grid_of: Callable[[int, int, int], GridTHW | None] | None = None,
        decode_timeout_s: float = 60.0,
    ) -> None:
        self.clips = tuple(clips)
        self.num_frames = num_frames
        self.frame_transform = frame_transform
        self.grid_of = grid_of
        self.decode_timeout_s = decode_timeout_s

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample | Skipped:
        clip = self.clips[index]
        try:
            frames = decode_frames(clip.video, self.num_frames, timeout_s=self.decode_timeout_s)
        except VideoError as error:
            return Skipped(clip, str(error))
        height, width = frames.shape[-2:]
        grid_thw = None if self.grid_of is None else self.grid_of(self.num_frames, height, width)
        return Sample(clip, frames=self.frame_transform(frames), grid_thw=grid_thw)


class FeatureDataset(Dataset[Sample | Skipped]):
    """Clips with the frozen encoder's features (F, P, Dv) out of a complete cache; clips skipped in the build stay skipped.

    Args:
        clips: The clips, in the order of the indices.
        features: A cache that holds them all.

    Raises:
        UserError: The cache is not complete or does not know some of the clips.
    """

    def __init__(self, clips: Sequence[Clip], features: FeatureCache) -> None:
        self.clips = tuple(clips)
        self.features = features
        unknown = [clip.id for clip in clips if clip.id not in features]
        if unknown:
            raise UserError(
                f"the feature cache {features.folder} lacks {len(unknown)} of {len(clips)} clips, first: {unknown[0]}; "
                "remove that folder to build it again"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample | Skipped:
        clip = self.clips[index]
        if reason := self.features.skipped.get(clip.id):
            return Skipped(clip, reason)
        return Sample(clip, features=self.features.read(clip.id), grid_thw=self.features.grid_thw(clip.id))
