"""Time and memory of BLEU, CIDEr, CIDEr-D and ROUGE-L: vlmcap against pycocoevalcap, on one core, in one run.

    python benchmarks/metrics/speed.py [--pairs 40000] [--tokens 108] [--repeats 2] [--stream 1000000]

Each runs in a process of its own, alone, and builds the same seeded corpus of Korean-looking words (frequencies as 1 / rank; a
prediction keeps 70 % of its reference). pycocoevalcap's Bleu, Cider and Rouge get the tokens joined by blanks, as they want them; vlmcap
gets the lists of tokens. Times are processor seconds, the least of the repeats, from tokens to scores, references counted anew; a later
epoch counts only the predictions. "memory" is the peak above what the corpus and the imports took, "whole" that of the process.

Raw text: `score_captions` with mecab-ko in wall seconds, tokenising in as many processes as there are cores, first and second epoch.
Streaming: many short predictions from a generator against counted references: the memory after counting and what it grows by.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

VOCABULARY = 20_000
KEPT = 0.7
RAW_CHARACTERS = 650

Corpus = tuple[list[list[str]], list[list[list[str]]]]


def main() -> None:
    arguments = parse()
    if arguments.job:
        print(json.dumps(JOBS[arguments.job](arguments)))
        return
    rows = {job: run(job, arguments) for job in ("vlmcap", "pycocoevalcap", "raw text", "streaming")}
    result = {"machine": machine(), "pairs": arguments.pairs, "tokens": arguments.tokens, "results": rows}
    report(result)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result, arguments.output / "speed.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--tokens", type=int, default=108)
    parser.add_argument("--repeats", type=int, default=2, help="of vlmcap; pycocoevalcap runs once from 10 000 pairs on")
    parser.add_argument("--stream", type=int, default=1_000_000, help="pairs of ten tokens in the streaming case")
    parser.add_argument("--raw", type=int, default=4_000, help="pairs of 650 characters in the raw text case")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(job: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one job, measured in a process of its own."""
    options = [f"--{key}={getattr(arguments, key)}" for key in ("pairs", "tokens", "repeats", "stream", "raw")]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, __file__, f"--job={job}", *options], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{job} stopped:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def corpus(pairs: int, tokens: int, seed: int = 0) -> Corpus:
    """Predictions and references; a third longer or shorter than `tokens` at most, one reference a clip."""
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
        scores |= {f"bleu_{n}": float(s) for n, s in enumerate(score, start=1)} if name == "bleu" else {name: float(score)}
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
    get_tokenizer("mecab_ko")("바다")
    epochs = []
    for _ in range(2):
        before = time.perf_counter()
        score_captions(predictions, references, metrics=names)
        epochs.append(time.perf_counter() - before)
    return {"pairs": arguments.raw, "first_s": epochs[0], "later_s": epochs[1], "cores": os.cpu_count()}


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


def machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("numpy", "pycocoevalcap", "mecab-ko")}
    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0]
    except (OSError, IndexError):
        processor = platform.processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"processor": processor, "cores": os.cpu_count(), "load": load, "python": platform.python_version(), **packages}


def report(result: dict[str, Any]) -> None:
    ours, theirs = result["results"]["vlmcap"], result["results"]["pycocoevalcap"]
    raw, stream = result["results"]["raw text"], result["results"]["streaming"]
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"{result['pairs']} pairs of about {result['tokens']} tokens\n")
    print(f"{'':22}{'first s':>10}{'later s':>10}{'memory MB':>12}{'whole MB':>10}")
    print(f"{'pycocoevalcap':22}{theirs['first_s']:10.1f}{theirs['first_s']:10.1f}{theirs['memory_mb']:12.0f}{theirs['whole_mb']:10.0f}")
    print(f"{'vlmcap':22}{ours['first_s']:10.2f}{ours['later_s']:10.2f}{ours['memory_mb']:12.0f}{ours['whole_mb']:10.0f}")
    ratios = [theirs["first_s"] / ours["first_s"], theirs["first_s"] / ours["later_s"]]
    sizes = [theirs["memory_mb"] / ours["memory_mb"], theirs["whole_mb"] / ours["whole_mb"]]
    print(f"{'times better':22}{ratios[0]:10.1f}{ratios[1]:10.1f}{sizes[0]:12.1f}{sizes[1]:10.1f}")
    print("pycocoevalcap by scorer: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in theirs["seconds"].items()))
    off = max(abs(ours["scores"][name] - score) for name, score in theirs["scores"].items())
    print(f"largest difference of the scores: {off:.1e}\n")
    print(f"raw text, {raw['pairs']} pairs, {raw['cores']} cores: first epoch {raw['first_s']:.1f} s, second {raw['later_s']:.1f} s (wall)")
    print(
        f"streaming, {stream['pairs']} pairs of 10 tokens: references {stream['count_s']:.1f} s and {stream['references_mb']:.0f} MB, "
        f"predictions {stream['score_s']:.1f} s and {stream['growth_mb']:.0f} MB more, "
        f"of which statistics {stream['statistics_mb']:.0f} MB; peak {stream['whole_mb']:.0f} MB"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return
    ours, theirs = result["results"]["vlmcap"], result["results"]["pycocoevalcap"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    axes[0].barh(["vlmcap, later", "vlmcap", "pycocoevalcap"], [ours["later_s"], ours["first_s"], theirs["first_s"]])
    axes[0].set(xlabel="processor seconds", xscale="log")
    axes[1].barh(["vlmcap", "pycocoevalcap"], [ours["whole_mb"], theirs["whole_mb"]])
    axes[1].set(xlabel="peak memory, MB")
    figure.suptitle(f"BLEU + CIDEr + CIDEr-D + ROUGE-L, {result['pairs']} pairs of {result['tokens']} tokens, one core")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


JOBS = {"vlmcap": vlmcap_job, "pycocoevalcap": pycocoevalcap_job, "raw text": raw_job, "streaming": streaming_job}


if __name__ == "__main__":
    main()
