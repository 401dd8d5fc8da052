"""`python -m vlmcap.metrics predictions.jsonl`: caption scores of any file of predictions."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.metrics.backend import BACKENDS, score_with
from vlmcap.metrics.captions import read_captions
from vlmcap.metrics.diversity import collapse_warning
from vlmcap.metrics.scores import METRIC_LABELS, METRIC_NAMES, score_by_category
from vlmcap.metrics.tokenizers import DEFAULT_TOKENIZER, TOKENIZER_NAMES, Tokenizer, get_tokenizer

_GROUP_METRICS = ("bleu_4", "cider", "rouge_l")
_FILES = """\
files:
  JSONL   {"id": …, "prediction": …, "references": [..., ...]}, one object per line, as written by train.py and
          evaluate.py; if objects have a "category", BLEU-4, CIDEr and ROUGE-L of each are added
  JSON    COCO's results [{"image_id": …, "caption": …}], with --references annotations.json
  text    one caption per line, with --references refs.txt [refs2.txt ...], whose line n belongs to line n

metrics: """


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; a user's mistake gives one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        # Warnings follow the table, a line each, without the place in the code that Python prints; equal ones appear
        # once.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _score(options)
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            print(f"Warning: {text}", file=sys.stderr)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlmcap.metrics",
        description="Caption scores of a file of predictions, on Korean morphemes unless another tokenizer is named.",
        epilog=_FILES + ", ".join(METRIC_NAMES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="JSONL, JSON or text, see below")
    parser.add_argument(
        "--references", type=Path, nargs="+", default=[], metavar="FILE", help="references, if they are in other files"
    )
    parser.add_argument(
        "--tokenizer",
        default=DEFAULT_TOKENIZER,
        metavar="NAME",
        help=f"one of {', '.join(TOKENIZER_NAMES)} (default: %(default)s)",
    )
    parser.add_argument("--metrics", metavar="NAME,NAME", help="metrics to compute, separated by commas (default: all)")
    parser.add_argument(
        "--normalize-fullwidth",
        action="store_true",
        help="count full-width forms (３ｋｍ) as the usual ones (3km)",
    )
    parser.add_argument(
        "--synonyms", type=Path, metavar="FILE", help='JSON file of equivalent content words: {"바다": ["해양"]}'
    )
    parser.add_argument(
        "--backend", default=BACKENDS[0], metavar="NAME", help=f"one of {', '.join(BACKENDS)} (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table; NaN is null")
    return parser


def _score(options: argparse.Namespace) -> None:
    metrics = None if options.metrics is None else [name.strip() for name in options.metrics.split(",") if name.strip()]
    tokenizer = get_tokenizer(options.tokenizer, normalize_fullwidth=options.normalize_fullwidth)
    corpus = read_captions(options.predictions, options.references)
    scores = score_with(
        options.backend,
        corpus.predictions,
        corpus.references,
        tokenizer=tokenizer,
        metrics=metrics,
        synonyms=options.synonyms,
    )
    groups: dict[Hashable, dict[str, float]] = {}
    if any(corpus.categories):
        groups = score_by_category(corpus.predictions, corpus.references, corpus.categories, tokenizer=tokenizer)
    if options.json:
        record = _record(scores, groups, tokenizer, options.backend, corpus.references)
        print(json.dumps(record, ensure_ascii=False, indent=2))
    else:
        print(_table(scores, tokenizer, options.backend, corpus.references))
        print(_group_table(groups), end="")
    if corpus.num_unused:
        print(f"Note: {corpus.num_unused} clips with references have no prediction and are left out.", file=sys.stderr)
    if warning := collapse_warning(corpus.predictions):
        print(f"Warning: {warning}", file=sys.stderr)


def _record(
    scores: dict[str, float],
    groups: dict[Hashable, dict[str, float]],
    tokenizer: Tokenizer,
    backend: str,
    references: list[list[str]],
) -> dict[str, object]:
    # Table and JSON show the three main scores of a category; `score_by_category` computes more.
    categories = {
        str(name): {key: _nan_to_none(row[key]) for key in ("clips", *_GROUP_METRICS)} for name, row in groups.items()
    }
    return {
        "scores": {name: _nan_to_none(value) for name, value in scores.items()},
        **({"categories": categories} if groups else {}),
        "tokenizer": {"name": tokenizer.name, "version": tokenizer.version},
        "backend": backend,
        "clips": len(references),
        "references": sum(map(len, references)),
    }


def _nan_to_none(value: float) -> float | None:
    # JSON has no NaN.
    return None if math.isnan(value) else value


def _table(scores: dict[str, float], tokenizer: Tokenizer, backend: str, references: list[list[str]]) -> str:
    labels = {name: METRIC_LABELS.get(name, name) for name in scores}
    width = max(map(len, labels.values()), default=0)
    counts = f"{len(references)} clips, {sum(map(len, references))} references"
    head = f"{counts}, tokens by {tokenizer.name} ({tokenizer.version})"
    if backend != "native":
        head += f", {backend}'s BLEU, CIDEr-D and ROUGE-L"
    return "\n".join([head, *(f"  {labels[name]:<{width}}  {value:9.4f}" for name, value in scores.items())])


def _group_table(groups: dict[Hashable, dict[str, float]]) -> str:
    """Formats one line per category; its name comes last, because Hangul takes two columns and breaks alignment."""
    if not groups:
        return ""
    labels = "".join(f"  {METRIC_LABELS[name]:>{_width(name)}}" for name in _GROUP_METRICS)
    head = f"{'clips':>7}{labels}  category"
    rows = [
        f"{row['clips']:7.0f}"
        + "".join(f"  {row[name]:{_width(name)}.4f}" for name in _GROUP_METRICS)
        + f"  {'(none)' if name == '' else name}"
        for name, row in groups.items()
    ]
    return "\n".join(["", head, *rows, ""])


def _width(name: str) -> int:
    # Two digits, the point, four decimals, and a space; a longer label makes its column wider.
    return max(8, len(METRIC_LABELS[name]))


if __name__ == "__main__":
    main()
