"""Train a captioner: `python train.py encoder=siglip2 llm=qwen3_8b hardware=l4`; see also `python train.py --help`."""

from vlmcap.cli.train import main
from vlmcap.program import run_program

if __name__ == "__main__":
    run_program(main, "train")
