"""Runs two processes over gloo, forked from a server that has imported everything, since a test should not fork.

`python -m tests.training.ranks FOLDER CACHE NAME=WORLD:OVERRIDE;OVERRIDE …` leaves a folder and a log a run, one run
after another.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_all(folder: Path, cache: Path, runs: dict[str, tuple[int, list[str]]], *, timeout_s: float = 400) -> None:
    """Runs of name to number of processes and overrides; raises with the logs of the first one that fails."""
    words = [f"{name}={world}:{';'.join(overrides)}" for name, (world, overrides) in runs.items()]
    command = [sys.executable, "-m", "tests.training.ranks", str(folder), str(cache), *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout_s, check=False)
    logs = "\n".join(path.read_text(encoding="utf-8")[-3000:] for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, logs


def main(folder: Path, cache: Path, words: list[str]) -> int:
    """Exits code: 1 at the first run of which a process fails."""
    import torch.distributed.fsdp  # noqa: F401

    from vlmcap.libraries import import_libraries

    import_libraries(with_adapters=True)
    for word in words:
        name, _, rest = word.partition("=")
        world, _, overrides = rest.partition(":")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [_fork(folder, cache, name, rank, int(world), port, overrides.split(";")) for rank in range(int(world))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            print(name, codes, file=sys.stderr)
            return 1
    return 0


def _fork(folder: Path, cache: Path, name: str, rank: int, world: int, port: int, overrides: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    log = os.open(folder / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if world > 1:
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
            os.environ |= common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        _train(folder / name, cache, overrides)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(folder: Path, cache: Path, overrides: list[str]) -> None:
    import faulthandler

    from tests.conftest import TINY_RUN
    from vlmcap.compose import compose
    from vlmcap.training.run import train

    faulthandler.dump_traceback_later(float(os.environ.get("VLMCAP_RANKS_TIMEOUT", "240")), exit=True)
    # Ranks draw dropout masks of their own, so only runs without dropout are equal whatever the number of ranks.
    folders = (f"paths.output_dir={folder}", f"paths.cache_dir={cache}")
    train(compose([*TINY_RUN, "projector=mlp", "tuning.lora.dropout=0.0", *folders, *overrides]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
