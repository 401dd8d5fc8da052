"""`vlmcap data`: inspects a data set before training on it."""

from __future__ import annotations

import dataclasses
import random
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.utils.data import DataLoader

from vlmcap.assembly.clips import Splits, load_splits
from vlmcap.assembly.components import load_prompt_of
from vlmcap.assembly.datasets import decoded_dataset
from vlmcap.assembly.resolving import token_limit
from vlmcap.compose import compose
from vlmcap.config import AUTO, Config, Sampling, Split
from vlmcap.data.duplicates import NUM_HASHED_FRAMES
from vlmcap.data.inspection import Broken, Entry, Inspection, Thumbnails, read_captions, read_videos, repeated_captions
from vlmcap.data.loading.lengths import caption_lengths
from vlmcap.data.loading.worker_report import WorkerWatch, worker_options
from vlmcap.demo.prepare import TINY, demo_folder
from vlmcap.errors import UserError
from vlmcap.files import write_text
from vlmcap.libraries import silence_libraries
from vlmcap.models.checkpoint import fingerprint, locate
from vlmcap.reporting.data_page import data_page, show_inspection
from vlmcap.terminal import progress_reporter
from vlmcap.types import Clip, Sample, Skipped

NUM_SAMPLES = 12  # clips shown on the page


def run(options: Namespace) -> None:
    """Checks a data set.

    Raises:
        UserError: An override is invalid, or nothing can be read.
    """
    check_data(options.overrides, options.output, max_clips=options.max_clips, reads_videos=not options.captions_only)


def check_data(
    overrides: Sequence[str], output: Path, *, max_clips: int | None = None, reads_videos: bool = True
) -> Inspection:
    """Inspects a data set, prints a summary, and writes a page with pictures.

    Args:
        overrides: Overrides as for train.py.
        output: HTML file of the page.
        max_clips: Number of videos read per split; None reads all. All captions are always read.
        reads_videos: Whether videos are decoded at all.

    Raises:
        UserError: The configuration is invalid, nothing can be read, or the folder of `output` does not exist.
    """
    if not output.parent.is_dir():
        raise UserError(f"--output: the folder {output.parent} does not exist; create it or choose another one")
    silence_libraries()
    config = compose(overrides)
    if config.data.is_demo:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(demo_folder(config))))
    # 1. Captions of all splits, from the annotations alone.
    # No split is required, as a data set may be checked before it is complete.
    splits = load_splits(config, (), tuple(Split))
    if not splits:
        raise UserError(
            f"data.root={config.data.root} holds no clip that data={config.data.kind} can read; check both settings"
        )
    report = Inspection(same_captions=repeated_captions(splits))
    report.broken += [
        # Entries that cannot be used are listed without a split.
        Broken(Entry("", skipped.clip.id, skipped.clip.video), skipped.reason)
        for skipped in splits.skipped
    ]
    report.splits = {split: read_captions(clips) for split, clips in splits.items()}
    if splits.note:
        print(f"Warning: {splits.note}", file=sys.stderr)
    note = _count_tokens(config, splits, report)
    # 2. The videos, which take most of the time.
    if reads_videos:
        _read_videos(config, splits, report, max_clips)
    # 3. The page, and a summary on the screen.
    limit = _caption_limit(config, report)
    title = f"{config.data.name}: {config.data.root}"
    write_text(output, data_page(report, title=title, llm=config.llm.name, limit=limit, note=note))
    show_inspection(report, llm=config.llm.name, limit=limit, note=note)
    print(f"{output}: {len(report.samples)} clips with pictures, the lengths of captions, and all findings")
    return report


def _count_tokens(config: Config, splits: Splits, report: Inspection) -> str:
    """Counts the tokens of captions in `report`; returns the reason if they cannot be counted, else an empty text."""
    group = "model" if config.is_pretrained_vlm else "llm"
    settings = getattr(config, group)
    checkpoint = settings.checkpoint
    if checkpoint == TINY:
        return (
            "tokens are not counted because the vocabulary of llm=tiny comes from the demo's captions; set llm to the "
            "one that you will train"
        )
    try:
        folder = locate(checkpoint, settings.revision, key=f"{group}.checkpoint", gate=settings.gate, has_weights=False)
        encode = load_prompt_of(config, folder).encode_caption
    except UserError as error:
        return f"tokens are not counted: {error}"
    counted = Path(config.paths.cache_dir) / "manifests"
    sha256 = fingerprint(folder, checkpoint, has_weights=False).sha256
    for split, clips in splits.items():
        report.splits[split].tokens = caption_lengths(clips, encode, folder=counted, fingerprint=sha256)
    return ""


def _caption_limit(config: Config, report: Inspection) -> int:
    """Returns the largest number of caption tokens that training does not truncate."""
    counted = [
        int(split.tokens.max()) for split in report.splits.values() if split.tokens is not None and len(split.tokens)
    ]
    return token_limit(max(counted)) if config.llm.max_caption_tokens == AUTO and counted else config.llm.caption_tokens


def _read_videos(config: Config, splits: Splits, report: Inspection, max_clips: int | None) -> None:
    # The first clips of each split, whose annotations were all read above.
    read = {split: clips[:max_clips] for split, clips in splits.items()}
    total = sum(map(len, read.values()))
    # The page's examples are drawn with the seed of the run, so that two checks show the same clips.
    chosen = sorted(random.Random(config.seed).sample(range(total), min(NUM_SAMPLES, total)))
    with progress_reporter("reading clips") as progress:
        for done in read_videos(report, _items(config, read), chosen=chosen):
            progress(done, total)
    if total < sum(map(len, splits.values())):
        print(f"Only {total} videos were read because of --max-clips.", file=sys.stderr)


def _items(config: Config, splits: Mapping[str, Sequence[Clip]]) -> Iterator[tuple[str, Sample | Skipped]]:
    data = dataclasses.replace(
        # A few small frames are enough to compare clips and to show them.
        config.data,
        num_frames=NUM_HASHED_FRAMES,
        sampling=Sampling.uniform,
        variable_frames=True,
    )
    config = dataclasses.replace(config, data=data)
    for split, clips in splits.items():
        dataset = decoded_dataset(config, Thumbnails(), _no_grid, clips)
        watch, workers = WorkerWatch(), config.data.num_workers
        watched = watch.watch(dataset, clips) if workers else dataset
        with watch.as_user_errors():
            for item in DataLoader(
                # Single samples without a collator.
                watched,
                batch_size=None,
                **worker_options(workers, 1, config.data.decode_timeout_s),
            ):
                yield split, item


def _no_grid(num_frames: int, height: int, width: int) -> None:
    """Returns no patch grid, because thumbnails are not encoded."""
