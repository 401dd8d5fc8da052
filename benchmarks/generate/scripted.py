"""A language model that does its full work but generates given captions, to time engines on captions of real length.

Random weights never end a caption where a trained model would. Here every step runs the whole of Qwen3 including its
head; then the logit of the scripted token is raised above all others. A token's id identifies its clip and its word,
and with the position of the token, which every engine has to give the model, the next one is known: engines need
nothing special, and a wrong position, cache row or stop results in a wrong caption.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

WORDS = 32  # of a clip's own vocabulary
END = 0  # id of the end token
MEAN, LEAST, MOST = 402, 311, 708  # Qwen3 tokens of captions in AI Hub's data set 71849
_FIRST_LOGIT = 1e4
_MARK = 1e3  # in the first channel of a prompt's last embedding, plus the clip's number


@dataclasses.dataclass(frozen=True)
class Task:
    """Clips to caption.

    Attributes:
        prompts: (S, Dl), input embeddings of each clip.
        captions: Ids of each clip's caption, including the end token.
    """

    prompts: list[Tensor]
    captions: list[list[int]]


def draw_lengths(count: int, seed: int, shrink: int = 1) -> list[int]:
    """Draws caption lengths with the data's least, mean and most, divided by `shrink`.

    The distribution between them is not known, so a beta distribution is assumed.
    """
    share = (MEAN - LEAST) / (MOST - LEAST)
    generator = np.random.default_rng(seed)
    drawn = LEAST + (MOST - LEAST) * generator.beta(2.0, 2.0 / share - 2.0, count)
    return [int(length) for length in (drawn / shrink).round()]


def make_task(
    model: ScriptedQwen3, count: int, prompt_tokens: int, *, seed: int, shrink: int = 1, phrases: int | None = None
) -> Task:
    """Makes clips with prompts of about `prompt_tokens` and captions with lengths like the data's.

    Args:
        model: Model that receives the script.
        count: Number of clips.
        prompt_tokens: Tokens of a prompt, plus or minus an eighth.
        seed: Seed of all draws.
        shrink: Factor by which captions are shorter.
        phrases: None for captions without repetition; otherwise their words come in this many phrases of 4 to 12 words.
    """
    generator = np.random.default_rng(seed)
    lengths = draw_lengths(count, seed, shrink)
    captions, prompts = [], []
    for clip, length in enumerate(lengths):
        words = _words(generator, length - 1, phrases)
        captions.append([1 + clip * WORDS + word for word in words] + [END])
        size = int(prompt_tokens * generator.uniform(0.875, 1.125))
        prompt = torch.from_numpy(generator.normal(size=(size, model.config.hidden_size)).astype(np.float32))
        prompt[-1, 0] = _MARK + clip
        prompts.append(prompt)
    model.script = Script([len(prompt) for prompt in prompts], captions)
    return Task(prompts, captions)


def _words(generator: np.random.Generator, count: int, phrases: int | None) -> list[int]:
    if phrases is None:
        return [int(word) for word in generator.integers(0, WORDS, count)]
    known = [generator.integers(0, WORDS, generator.integers(4, 13)).tolist() for _ in range(phrases)]
    words: list[int] = []
    while len(words) < count:
        words += known[generator.integers(0, phrases)]
    return words[:count]


class Script:
    """Next tokens by clip and position."""

    def __init__(self, prompt_lengths: list[int], captions: list[list[int]]) -> None:
        self.prompt_lengths = torch.tensor(prompt_lengths)
        self.captions = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in captions], batch_first=True, padding_value=END
        )

    def after(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Returns the tokens after tokens at positions, both (N, q); the end token where there is none."""
        clips = (ids - 1).clamp(min=0) // WORDS
        steps = (positions - self.prompt_lengths[clips] + 1).clamp(0, self.captions.shape[1] - 1)
        return self.captions[clips, steps]

    def first(self, embeddings: Tensor) -> Tensor:
        """Returns the first tokens after prompts (N, S, Dl) with padding on either side; (N, 1)."""
        clips = (embeddings[..., 0].amax(1) - _MARK).round().long()
        return self.captions[clips, :1]


class ScriptedQwen3(Qwen3ForCausalLM):
    """Qwen3 with random weights whose greedy captions are those of a script."""

    script: Script

    @functools.wraps(Qwen3ForCausalLM.forward)  # transformers' generate looks into the signature for what it may pass
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns logits in which the scripted token's is the highest."""
        output = super().forward(*args, **kwargs)
        ids = kwargs.get("input_ids")
        tokens = (
            self.script.first(kwargs["inputs_embeds"])
            if ids is None
            else self.script.after(ids, kwargs["position_ids"])
        )
        output.logits.scatter_(-1, tokens[:, -output.logits.shape[1] :, None], _FIRST_LOGIT)
        return output


def make_model(num_clips: int, layers: int, width: int) -> ScriptedQwen3:
    """Makes a Qwen3 with random weights and words for a number of clips."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1 + num_clips * WORDS,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return ScriptedQwen3(config).eval()
