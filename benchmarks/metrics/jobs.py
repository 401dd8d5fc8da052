"""The measurements of `speed.py`, each in a separate process."""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 20_000
KEPT = 0.7
RAW_CHARACTERS = 650

Corpus = tuple[list[list[str]], list[list[list[str]]]]


def one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def corpus(pairs: int, tokens: int, seed: int = 0) -> Corpus:
    """Makes predictions and references, at most a third longer or shorter than `tokens`, one reference per clip."""
    generator = random.Random(seed)
    words = [f"{chr(0xAC00 + i % 11172)}{chr(0xAC00 + i * 7 % 11172)}" for i in range(VOCABULARY)]
    cumulative, total = [], 0.0
    for rank in range(1, VOCABULARY + 1):
        total += 1 / rank
        cumulative.append(total)
    draw: Callable[[int], list[str]] = lambda k: generator.choices(words, cum_weights=cumulative, k=k)  # noqa: E731
    references = [[draw(generator.randint(tokens * 2 // 3, tokens * 4 // 3))] for _ in range(pairs)]
    hypotheses = []
    for (reference,) in references:
        other = draw(len(reference))
        kept = [a if generator.random() < KEPT else b for a, b in zip(reference, other, strict=True)]
        hypotheses.append(kept[: len(kept) - generator.randrange(len(kept) // 5 + 1)])
    return hypotheses, references


def vlmcap_job(arguments: argparse.Namespace) -> dict[str, Any]:
    one_core()
    from vlmcap.metrics.corpus import ReferenceCorpus, clip_statistics, corpus_scores

    hypotheses, references = corpus(arguments.pairs, arguments.tokens)
    start, figures = peak(), []
    for _ in range(arguments.repeats):
        before = time.process_time()
        counted = ReferenceCorpus(references)
        between = time.process_time()
        scores = corpus_scores(clip_statistics(hypotheses, counted))
        figures.append((between - before, time.process_time() - between))
        del counted
    count, score = min(figures, key=sum)
    return {"first_s": count + score, "later_s": score, "scores": scores, **memory(start)}


def pycocoevalcap_job(arguments: argparse.Namespace) -> dict[str, Any]:
    one_core()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, references = corpus(arguments.pairs, arguments.tokens)
    truth = {i: [" ".join(tokens) for tokens in refs] for i, refs in enumerate(references)}
    results = {i: [" ".join(tokens)] for i, tokens in enumerate(hypotheses)}
    del hypotheses, references
    start, seconds = peak(), {}
    scores: dict[str, float] = {}
    for name, make in (("bleu", lambda: Bleu(4)), ("cider_d", Cider), ("rouge_l", Rouge)):
        times = []
        for _ in range(1 if arguments.pairs >= 10_000 else arguments.repeats):
            before = time.process_time()
            options = {"verbose": 0} if name == "bleu" else {}
            score, _ = make().compute_score(truth, results, **options)
            times.append(time.process_time() - before)
        seconds[name] = min(times)
        scores |= (
            {f"bleu_{n}": float(s) for n, s in enumerate(score, start=1)} if name == "bleu" else {name: float(score)}
        )
    return {"first_s": sum(seconds.values()), "seconds": seconds, "scores": scores, **memory(start)}


def raw_job(arguments: argparse.Namespace) -> dict[str, Any]:
    from vlmcap.metrics import get_tokenizer, score_captions

    generator = random.Random(1)
    nouns, verbs = (
        ["바다", "산길", "도시", "마을", "공원", "시장", "다리", "항구", "골목", "호수"],
        ["보입니다", "흐릅니다", "지나갑니다", "빛납니다"],
    )

    def text() -> str:
        said = ""
        while len(said) < RAW_CHARACTERS:
            place, other, verb = generator.choice(nouns), generator.choice(nouns), generator.choice(verbs)
            said += f"화면의 {place}에서 {generator.randint(2, 99)}명의 사람이 {other} 쪽으로 {verb}. "
        return said

    predictions, references = [text() for _ in range(arguments.raw)], [[text()] for _ in range(arguments.raw)]
    names = ["bleu_4", "cider", "cider_d", "rouge_l"]
    split = get_tokenizer("mecab_ko")
    split("바다")
    tokenizing = []
    for workers in (1, os.cpu_count()):
        before = time.perf_counter()
        split.tokenize_many([*predictions, *(text for (text,) in references)], workers=workers)
        tokenizing.append(time.perf_counter() - before)
    epochs = []
    for _ in range(2):
        before = time.perf_counter()
        score_captions(predictions, references, metrics=names)
        epochs.append(time.perf_counter() - before)
    return {
        "pairs": arguments.raw,
        "first_s": epochs[0],
        "later_s": epochs[1],
        "cores": os.cpu_count(),
        "tokenize_one_process_s": tokenizing[0],
        "tokenize_all_cores_s": tokenizing[1],
    }


def streaming_job(arguments: argparse.Namespace) -> dict[str, Any]:
    one_core()
    from vlmcap.metrics.corpus import ReferenceCorpus, clip_statistics, corpus_scores

    def short(seed: int) -> Iterator[list[str]]:
        generator = random.Random(seed)
        words = [f"{chr(0xAC00 + i % 11172)}{i % 7}" for i in range(VOCABULARY)]
        for _ in range(arguments.stream):
            yield [words[int(VOCABULARY * generator.random() ** 4)] for _ in range(10)]

    before = time.process_time()
    counted = ReferenceCorpus([[tokens] for tokens in short(0)])
    between, start = time.process_time(), resident()
    statistics = clip_statistics(short(1), counted)
    seconds, end = time.process_time() - between, resident()
    corpus_scores(statistics)
    held = sum(getattr(statistics, name).nbytes for name in statistics.__slots__) / 1e6
    return {
        "pairs": arguments.stream,
        "count_s": between - before,
        "score_s": seconds,
        "references_mb": start,
        "growth_mb": end - start,
        "statistics_mb": held,
        "whole_mb": peak(),
    }


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def resident() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return peak()


def memory(start: float) -> dict[str, float]:
    return {"memory_mb": peak() - start, "whole_mb": peak()}


JOBS = {"vlmcap": vlmcap_job, "pycocoevalcap": pycocoevalcap_job, "raw text": raw_job, "streaming": streaming_job}
