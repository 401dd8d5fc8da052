"""`vlmcap spectrum`: encodes some frames with each encoder, computes figures of the features, and writes the files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmcap.assembly.base_checkpoints import encoder_configs, locate_base_checkpoints
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.components import device_of, load_encoder
from vlmcap.assembly.datasets import decoded_dataset, grid_of_frames
from vlmcap.assembly.features import encoding_of, free_memory
from vlmcap.assembly.resolving import with_model_kind
from vlmcap.compose import compose
from vlmcap.config import Config, Split
from vlmcap.demo.prepare import TINY, prepare
from vlmcap.errors import UserError
from vlmcap.files import write_json
from vlmcap.libraries import silence_libraries
from vlmcap.locks import claimed_folder
from vlmcap.models.encoders import VisionEncoder
from vlmcap.spectrum.figures import FrameFeatures, Spectrum, measure_spectrum
from vlmcap.spectrum.show import EncoderSpectrum, draw_comparison, draw_spectrum, print_spectra, spectra_record
from vlmcap.sweep_syntax import expand, short_names
from vlmcap.terminal import progress_reporter
from vlmcap.types import Clip, Sample

MAX_FRAMES = 64  # frames in memory, spread over the clips; tens of MB each for the largest encoders
LAYER_FRAMES = 8  # frames for the figures of layers


@dataclass(frozen=True, slots=True)
class SpectrumSettings:
    """Settings of `vlmcap spectrum`.

    Attributes:
        num_clips: Number of clips of the validation split.
        max_tokens: Patches in the singular values.
        has_layers: Whether each layer is measured, too.
        images: Images or videos in place of the data's clips.
    """

    num_clips: int
    max_tokens: int
    has_layers: bool
    images: tuple[Path, ...]


def show_spectra(overrides: Sequence[str], settings: SpectrumSettings, folder: Path, *, as_json: bool = False) -> None:
    """Measures each encoder, prints a table or JSON, and writes `spectrum.json` and the pictures.

    Args:
        overrides: Overrides as `train.py` takes them; each combination of swept values is one encoder.
        settings: Settings of the measurement.
        folder: Folder of the files.
        as_json: Whether JSON is printed.

    Raises:
        UserError: An override is wrong, or an encoder or a clip cannot be used.
    """
    silence_libraries()
    jobs, swept = expand(overrides)
    # One encoder per job: `encoder=a,b` is expanded as in a sweep.
    configs = [with_model_kind(compose(job)) for job in jobs]
    names = (
        short_names(jobs, swept)
        if len(jobs) > 1
        else [configs[0].model.name if configs[0].is_pretrained_vlm else configs[0].encoder.name]
    )
    spectra: list[EncoderSpectrum] = []
    with claimed_folder(folder, "--output"):
        with progress_reporter("encoders") as report:
            for name, config in zip(names, configs, strict=True):
                spectrum = measure_encoder(name, config, settings)
                draw_spectrum(spectrum, folder / f"{_file_name(name)}.png")
                spectra.append(spectrum)
                report(len(spectra), len(jobs))
        record = spectra_record(spectra)
        write_json(folder / "spectrum.json", record)
        if len(spectra) > 1:
            draw_comparison(spectra, folder / "comparison.png")
    if as_json:
        print(json.dumps(record, ensure_ascii=False, indent=2))
    else:
        print_spectra(spectra)
        print(f"spectrum.json and pictures: {folder}")


def measure_encoder(name: str, config: Config, settings: SpectrumSettings) -> EncoderSpectrum:
    """Returns the figures of one encoder's features, and one frame for the pictures.

    Raises:
        UserError: The encoder or the clips are not available, or no clip can be read.
    """
    # 1. The clips and the encoder, without a language model.
    device_of(config)  # refuses a missing GPU before anything is made
    is_tiny = config.encoder.checkpoint == TINY
    if not is_tiny:  # prepare then makes no tiny language model
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, checkpoint="unused"))
    if is_tiny or not settings.images:
        config = prepare(config)
    clips = _clips(config, settings)
    if len(encoder_configs(config)) > 1:
        raise UserError(f"encoder={config.encoder.name} joins two encoders; measure each with encoder=NAME,NAME")
    folders = locate_base_checkpoints(config, is_encoder_only=True).folders
    # Pooling would hide how patches differ.
    encoder = load_encoder(dataclasses.replace(config, cache=dataclasses.replace(config.cache, pooled=False)), folders)
    # 2. The features of some frames of each clip, and of all layers for the first clip.
    frames: list[FrameFeatures] = []
    pictures: list[Tensor | None] = []
    layers: dict[str, Spectrum] = {}
    # An equal share of the limit for each clip.
    keep = max(1, MAX_FRAMES // len(clips))
    for sample in _samples(config, encoder, clips):
        if settings.has_layers and not layers:
            layers = _layers(config, encoder, sample, settings)
        clip_frames, clip_pictures = _encode(config, encoder, sample, keep)
        frames += clip_frames
        pictures += clip_pictures
    if not frames:
        raise UserError(f"none of the {len(clips)} clips can be read; check data.root or --images")
    # 3. The figures of all frames, and the frame in the middle for the pictures.
    spectrum = measure_spectrum(frames, max_tokens=settings.max_tokens, seed=config.seed)
    middle = len(frames) // 2
    layer = encoder.feature_layer
    # Before the next encoder is loaded.
    del encoder
    free_memory()
    return EncoderSpectrum(name, layer, spectrum, frames[middle], pictures[middle], layers)


def _clips(config: Config, settings: SpectrumSettings) -> list[Clip]:
    """Returns the given images, or clips spread evenly over the validation split (or the first split there is)."""
    if settings.images:
        missing = next((path for path in settings.images if not path.is_file()), None)
        if missing is not None:
            raise UserError(f"--images: {missing} does not exist")
        return [Clip(str(index), str(path), ()) for index, path in enumerate(settings.images)]
    splits = load_splits(config, (), tuple(Split))
    clips = splits.get("val") or next(iter(splits.values()))
    count = min(settings.num_clips, len(clips))
    return [clips[index * len(clips) // count] for index in range(count)]


def _samples(config: Config, encoder: VisionEncoder, clips: Sequence[Clip]) -> Iterator[Sample]:
    dataset = decoded_dataset(config, encoder.transform, grid_of_frames(config, encoder), clips)
    for index in range(len(clips)):
        item = dataset[index]
        if isinstance(item, Sample):
            yield item


def _encode(
    config: Config, encoder: VisionEncoder, sample: Sample, keep: int
) -> tuple[list[FrameFeatures], list[Tensor | None]]:
    """Returns the features of some frames of a clip with their prefix tokens, and the frames as pictures."""
    assert sample.frames is not None
    prefixes: list[Tensor] = []

    def keep_prefix(_: Any, __: Any, output: Any) -> None:
        prefixes.append(output.last_hidden_state[:, : encoder.num_prefix_tokens])

    handle = encoder.tower.register_forward_hook(keep_prefix) if encoder.num_prefix_tokens else None
    # A batch of one clip.
    grids = None if sample.grid_thw is None else [sample.grid_thw]
    try:
        features = encoding_of(config, encoder)(sample.frames[None], grids)
    finally:
        if handle is not None:
            handle.remove()
    # Qwen-VL joins two frames into one, so there may be fewer grids than pictures.
    num_frames, *side = sample.grid_thw or (len(features[0]), *encoder.grid)
    grid = (side[0], side[1])
    indices = torch.linspace(0, num_frames - 1, min(keep, num_frames)).round().long().tolist()
    frames = [
        FrameFeatures(
            features[0][index, : grid[0] * grid[1]].float().cpu(),
            grid,
            prefixes[0][index].float().cpu() if prefixes else None,
        )
        for index in indices
    ]
    joined = getattr(encoder, "frames_per_token", 1)  # Qwen-VL joins frames, too, but keeps no picture
    return frames, [_picture(sample.frames, index * joined, grid) for index in indices]


def _picture(frames: Tensor, index: int, grid: tuple[int, int]) -> Tensor | None:
    """Returns a frame as uint8 (H, W, 3), or None where there is no such frame (Qwen-VL joins two frames)."""
    if frames.dim() == 4 and index < len(frames):
        return frames[index].permute(1, 2, 0)
    if frames.dim() == 3 and index < len(frames):  # NaFlex: patches of rows of pixels, then colours
        side = round((frames.shape[-1] // 3) ** 0.5)
        patches = frames[index, : grid[0] * grid[1]]
        if side * side * 3 == frames.shape[-1]:
            # (h * w, 3 * side²) -> (h * side, w * side, 3)
            return (
                patches.reshape(*grid, side, side, 3).permute(0, 2, 1, 3, 4).reshape(grid[0] * side, grid[1] * side, 3)
            )
    return None


def _layers(config: Config, encoder: VisionEncoder, sample: Sample, settings: SpectrumSettings) -> dict[str, Spectrum]:
    """Returns layer number to figures, of the frames of one clip.

    Figures are computed as each layer ends, so that the features of only one layer are in memory.

    Raises:
        UserError: Frames have different sizes, so that the tokens of a layer are in no plain order.
    """
    if config.is_pretrained_vlm or (sample.grid_thw is not None and sample.grid_thw[1:] != encoder.grid):
        raise UserError("--layers needs an encoder whose frames have one size; remove it")
    assert sample.frames is not None
    # The longest list of modules holds the blocks, whatever the architecture calls it.
    lists = [module for module in encoder.tower.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = max(lists, key=len, default=torch.nn.ModuleList())
    spectra: dict[str, Spectrum] = {}
    prefix, num_patches = encoder.num_prefix_tokens, encoder.num_patches

    def keep(number: int, output: Any) -> None:
        # Blocks return the hidden states, or a tuple that begins with them.
        hidden = (output[0] if isinstance(output, tuple) else output).float().cpu()
        if encoder.frames_per_token > 1:
            hidden = hidden.flatten(0, 1).unflatten(0, (-1, num_patches))  # (1, T · P, Dv) -> (T, P, Dv)
        # (T, R + P, Dv) -> (LAYER_FRAMES, P, Dv): prefix tokens come first
        tokens = hidden[:LAYER_FRAMES, -num_patches:]
        frames = [
            FrameFeatures(patches, encoder.grid, states[:prefix] if prefix else None)
            for patches, states in zip(tokens, hidden[:LAYER_FRAMES], strict=True)
        ]
        spectra[str(number)] = measure_spectrum(frames, max_tokens=settings.max_tokens, seed=config.seed)

    handles = [
        block.register_forward_hook(lambda _, __, output, number=number: keep(number, output))
        for number, block in enumerate(blocks, 1)
    ]
    try:
        encoding_of(config, encoder)(sample.frames[None], None if sample.grid_thw is None else [sample.grid_thw])
    finally:
        for handle in handles:
            handle.remove()
    return spectra


def _file_name(name: str) -> str:
    """Replaces characters that do not belong in a file name."""
    return re.sub(r"[^\w.=-]+", "_", name)
