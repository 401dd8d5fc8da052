"""Score a checkpoint: `python evaluate.py checkpoint=outputs/…/checkpoints/best.ckpt data.split=test`."""

from vlmcap.cli.evaluate import main
from vlmcap.program import run_program

if __name__ == "__main__":
    run_program(main, "evaluate")
