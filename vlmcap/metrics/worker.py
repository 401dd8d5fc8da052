"""A process that tokenizes texts for another one: JSON in, JSON out; started by `vlmcap.metrics.tokenizers`."""

from __future__ import annotations

import json
import sys

from vlmcap.metrics.tokenizers import get_tokenizer


def main(name: str) -> None:
    """Reads the texts and whether to convert full-width forms from stdin, and writes the tokens of each text."""
    normalize_fullwidth, texts = json.load(sys.stdin.buffer)
    tokenizer = get_tokenizer(name, normalize_fullwidth=normalize_fullwidth)
    # ASCII escapes represent any string, including half surrogates of broken input.
    sys.stdout.write(json.dumps([tokenizer(text) for text in texts]))


if __name__ == "__main__":
    main(sys.argv[1])
