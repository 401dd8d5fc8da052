"""A process that tokenises for another: JSON in, JSON out; `vlmcap.metrics.tokenizers` starts it."""

from __future__ import annotations

import json
import sys

from vlmcap.metrics.tokenizers import get_tokenizer


def main(name: str) -> None:
    """Reads whether to fold full-width forms, and the texts, and writes the tokens of each."""
    normalize_fullwidth, texts = json.load(sys.stdin.buffer)
    tokenizer = get_tokenizer(name, normalize_fullwidth=normalize_fullwidth)
    # ASCII escapes carry any string, half surrogates of broken input included.
    sys.stdout.write(json.dumps([tokenizer(text) for text in texts]))


if __name__ == "__main__":
    main(sys.argv[1])
