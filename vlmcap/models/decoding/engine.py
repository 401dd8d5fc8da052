"""Greedy captions of many clips by a few rows, which are never idle while clips wait.

A step of the language model costs nearly the same for one row as for many, and captions differ in length: in plain
batches, rows that have ended wait for the longest. Here they leave, and waiting clips take their places, as in
continuous batching (Yu et al., Orca, https://www.usenix.org/conference/osdi22/presentation/yu).

All that a step needs and changes stays on the device, and its shapes are few, so that it can be captured as a CUDA
graph.

Legend: R rows, N rows of one call, S sequence, q tokens a row in one step, Dl language width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmcap.models.decoding.cache import RowCache
from vlmcap.models.decoding.graphs import CapturedSteps, Graphs
from vlmcap.models.decoding.texts import RowTexts
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import FLASH, PACKABLE, REPEATED

if TYPE_CHECKING:
    from vlmcap.models.decoding.settings import GenerationSettings

_DRAFT = 4  # tokens that are guessed at a time: every row pays for them
_GROUP = 8  # newcomers come in when an eighth of the rows is free, as reading their prompts one by one would be slower
PROMPT_TOKENS = 8192  # of prompts that are read at a time: they keep a GPU busy, and more would only take memory
# Steps between two looks at which captions have ended. A look makes the host wait for the GPU; between two, a row that
# has ended idles for half of them, 2 % of a caption of 400 tokens. On a CPU a look costs nothing.
LOOK_EVERY = 16
# Columns, a multiple of which a step looks at: a captured step has one shape, and a caption of 768 tokens meets four of
# this size, while the columns beyond the longest row's end are a few per cent of all.
_BLOCK, _CPU_BLOCK = 256, 8  # on a CPU, kernels want rows of the mask that are a multiple of 8 long
_ATTENTION = ("sdpa", REPEATED, "eager", *FLASH)
_ROTARY = ("default", "linear", "llama3", "yarn")  # others change all rows' angles with the longest row
# Settings of a checkpoint's generation file that transformers' generate follows beside those that vlmcap sets.
_EXTRAS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
)


def can_decode(llm: nn.Module) -> bool:
    """Whether `greedy_ids` writes what transformers' generate would.

    All layers see all keys, and nothing else steers the choice.
    """
    return not obstacle(llm)


def obstacle(llm: nn.Module) -> str:
    """Why `can_decode` refuses a language model; empty if it accepts it."""
    model: Any = base_model(llm)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "lm_head"):
        return "the language model is of no class of transformers with a head"
    if config._attn_implementation not in _ATTENTION:
        return f"llm.attention={config._attn_implementation} is none of {', '.join(_ATTENTION)}"
    return _obstacle(config, getattr(model, "generation_config", None))


def is_decodable(config: Any, generation_config: Any) -> bool:
    """Whether `can_decode` accepts a language model with these settings; no weights are needed.

    Args:
        config: transformers' configuration of the language model.
        generation_config: Its generation settings; None where it has none.
    """
    return not _obstacle(config, generation_config)


def _obstacle(config: Any, generation_config: Any) -> str:
    if config.model_type not in PACKABLE:
        return f"the class {config.model_type} is not known to keep rows apart"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in _ROTARY:
        return f"its rope_type={rotary} changes all rows with the longest one"
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers):
        return "some of its layers see a window of the text"
    steering = [name for name in _EXTRAS if getattr(generation_config, name, None)]
    return f"its generation_config.json sets {', '.join(steering)}" if steering else ""


@torch.no_grad()
def greedy_ids(
    llm: nn.Module,
    prompts: Iterable[Tensor],
    settings: GenerationSettings,
    stop_ids: Collection[int],
    num_rows: int,
    graphs: Graphs | None = None,
) -> list[list[int]]:
    """Ids of captions in the order of the prompts, each up to and with its first end token, as transformers' greedy search finds them.

    Args:
        llm: Causal language model that `can_decode` accepts, with or without adapters.
        prompts: Input embeddings (S, Dl) of each clip, without padding; drawn as rows get free.
        settings: Length, repetition controls and guessing.
        stop_ids: Tokens that end a caption.
        num_rows: Captions that are written at a time.
        graphs: Captures steps as graphs; None runs them as they are.
    """
    decoder = _Decoder(llm, settings, stop_ids, num_rows, graphs)
    waiting = _Waiting(prompts)
    done: dict[int, list[int]] = {}
    with _masked_attention(decoder.model.config):
        while decoder.admit(waiting) or decoder.rows:
            done |= decoder.take_finished()
            if decoder.rows:
                decoder.advance()
                done |= decoder.take_finished()
    return [done[request] for request in range(len(done))]


@contextmanager
def _masked_attention(config: Any) -> Iterator[None]:
    """Within it, PyTorch's attention runs in place of FlashAttention, which takes no mask in which each row ends at a place of its own."""
    chosen = config._attn_implementation
    if chosen not in FLASH:
        yield
        return
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = chosen


class _Waiting:
    """Prompts with their numbers, of which the next one can be looked at before it is taken."""

    def __init__(self, prompts: Iterable[Tensor]) -> None:
        self._prompts = enumerate(prompts)
        self._next: tuple[int, Tensor] | None = None

    def take(self, most: int) -> list[tuple[int, Tensor]]:
        """Up to `most` prompts of `PROMPT_TOKENS` tokens together, padded to the longest.

        One at least where there is any.
        """
        taken: list[tuple[int, Tensor]] = []
        longest = 0
        while len(taken) < most:
            if self._next is None:
                self._next = next(self._prompts, None)
            if self._next is None:
                break
            longest = max(longest, len(self._next[1]))
            if taken and longest * (len(taken) + 1) > PROMPT_TOKENS:
                break
            taken.append(self._next)
            self._next = None
        return taken


@dataclass
class _Row:
    """What the host knows of a row.

    Attributes:
        request: Number of its clip.
        num_prompt_tokens: Before the caption.
        num_written: Tokens that the caption had at the last look.
    """

    request: int
    num_prompt_tokens: int
    num_written: int = 1


class _Decoder:
    """The rows that are being written, in the places 0 to N of the cache."""

    def __init__(
        self,
        llm: nn.Module,
        settings: GenerationSettings,
        stop_ids: Collection[int],
        num_rows: int,
        graphs: Graphs | None = None,
    ) -> None:
        model: Any = base_model(llm)
        self.model, self.num_rows, self.max_new_tokens = model, num_rows, settings.max_new_tokens
        device = model.get_input_embeddings().weight.device
        self.is_on_host = device.type == "cpu" and graphs is None
        self.look_every, self.block = (1, _CPU_BLOCK) if self.is_on_host else (LOOK_EVERY, _BLOCK)
        self.cache, self.texts = RowCache(num_rows), RowTexts(num_rows, settings, stop_ids, device)
        self.steps = CapturedSteps(graphs)
        self.rows: list[_Row] = []
        self._has_looked = True

    def admit(self, waiting: _Waiting) -> int:
        """Number of newcomers, whose prompts were read and whose first token was written."""
        before = len(self.rows)
        if before and self.num_rows - before < max(1, self.num_rows // _GROUP):
            return 0
        while newcomers := waiting.take(self.num_rows - len(self.rows)):
            self._read([prompt for _, prompt in newcomers])
            self.rows += [_Row(request, len(prompt)) for request, prompt in newcomers]
        return len(self.rows) - before

    def _read(self, prompts: list[Tensor]) -> None:
        # Padded on the right, so that keys stand from the first column on, and no token sees padding: it comes later
        # than all of them.
        embeddings = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        first, width = len(self.rows), embeddings.shape[1]
        if self.cache.reserve(_rounded(width + self.max_new_tokens + _DRAFT, self.block)):
            self.steps.forget()
        self.cache.expect_newcomers(first, width)
        for row, prompt in enumerate(prompts, first):
            self.texts.start(row, len(prompt))
        # The head runs on last tokens only, through the class's own forward, as some scale what it gives (HyperCLOVA
        # X).
        handle = self.model.lm_head.register_forward_pre_hook(
            # (N, S, Dl) -> (N, 1, Dl)
            lambda _, inputs: (
                torch.stack([hidden[len(prompt) - 1] for hidden, prompt in zip(inputs[0], prompts, strict=True)])[
                    :, None
                ],
            )
        )
        try:
            logits = self.model(inputs_embeds=embeddings, past_key_values=self.cache, use_cache=True).logits
        finally:
            handle.remove()
        self.texts.write(logits, logits.new_empty(len(prompts), 0), first)
        self._has_looked = False

    def advance(self) -> None:
        """Writes the next tokens of every row, up to the next look at which have ended."""
        count = len(self.rows) if self.is_on_host else min(self.num_rows, 1 << (len(self.rows) - 1).bit_length())
        num_tokens = 1 + (_DRAFT if self.texts.lookup else 0)
        num_steps = min(self.look_every, self.max_new_tokens - min(row.num_written for row in self.rows))
        ahead = (num_steps - 1) * num_tokens  # that a row may have written before the last of the steps
        longest = max(row.num_prompt_tokens + min(row.num_written + ahead, self.max_new_tokens) for row in self.rows)
        width = min(_rounded(longest - 1 + num_tokens, self.block), self.cache.num_columns)
        for _ in range(num_steps):
            self.steps.run((count, width), partial(self._step, count, width))
        self._has_looked = False

    def _step(self, count: int, width: int) -> None:
        """Writes the next token of rows 0 to `count`, and those behind it that were guessed rightly."""
        drafts = self.texts.drafts(count, _DRAFT)
        if self.is_on_host and drafts.numel() and not bool((drafts >= 0).any()):
            drafts = drafts[:, :0]
        tokens = torch.cat([self.texts.last(count), drafts.clamp(min=0)], dim=1)
        positions, mask = self.cache.expect_step(self.texts.num_cached(count), width, tokens.shape[1])
        logits = self.model(
            input_ids=tokens,
            attention_mask=self._as_wanted(mask),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.texts.write(logits, drafts)

    def _as_wanted(self, mask: Tensor) -> Tensor:
        """The mask as the model's attention takes it."""
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def take_finished(self) -> dict[int, list[int]]:
        """Ids of the captions that have ended, by request; the last of the other rows take their places."""
        if self._has_looked:
            return {}
        self._has_looked = True
        texts, num_rows = self.texts, len(self.rows)
        counts, ends = torch.stack([texts.counts[:num_rows], texts.is_done[:num_rows].long()]).tolist()
        for row, written in zip(self.rows, counts, strict=True):
            row.num_written = written
        finished = [index for index in range(num_rows) if ends[index]]
        if not finished:
            return {}
        ids = torch.stack([texts.ids[index] for index in finished]).tolist()
        found = {self.rows[index].request: own[: counts[index]] for index, own in zip(finished, ids, strict=True)}
        going = num_rows - len(finished)
        free = [index for index in finished if index < going]
        movers = [index for index in range(going, num_rows) if not ends[index]]
        self.cache.move_rows(movers, free)
        for source, target in zip(movers, free, strict=True):
            texts.move(source, target)
            self.rows[target] = self.rows[source]
        texts.is_done[going:num_rows] = True
        del self.rows[going:]
        return found


def _rounded(number: int, block: int) -> int:
    return -(-number // block) * block
