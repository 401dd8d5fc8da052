"""Greedy captions of many clips by a few rows, which are never idle while clips wait.

A step of the language model costs nearly the same for one row as for many, and captions differ in length: in plain batches, rows that
have ended wait for the longest. Here they leave at once, and waiting clips take their places, as in continuous batching (Yu et al.,
Orca, https://www.usenix.org/conference/osdi22/presentation/yu).

Legend: N rows, S sequence, q tokens a row in one step, Dl language width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmcap.models.decoding.cache import RowCache
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import FLASH, PACKABLE, REPEATED

if TYPE_CHECKING:
    from vlmcap.models.decoding.settings import GenerationSettings

_DRAFT = 4  # most tokens that are guessed at a time: every row pays for the longest guess
_GROUP = 8  # newcomers come in when an eighth of the rows is free, as reading their prompts one by one would be slower
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
    """Whether `greedy_ids` writes what transformers' generate would: all layers see all keys, and nothing else steers the choice."""
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
    llm: nn.Module, prompts: Iterable[Tensor], settings: GenerationSettings, stop_ids: Collection[int], num_rows: int
) -> list[list[int]]:
    """Ids of captions in the order of the prompts, each up to and with its first end token, as transformers' greedy search finds them.

    Args:
        llm: Causal language model that `can_decode` accepts, with or without adapters.
        prompts: Input embeddings (S, Dl) of each clip, without padding; drawn as rows get free.
        settings: Length, repetition controls and guessing.
        stop_ids: Tokens that end a caption.
        num_rows: Captions that are written at a time.
    """
    decoder = _Decoder(llm, settings, stop_ids, num_rows)
    waiting = enumerate(prompts)
    done: dict[int, list[int]] = {}
    with _masked_attention(decoder.model.config):
        while decoder.admit(waiting) or decoder.rows:
            done |= {row.request: row.ids for row in decoder.take_finished()}
            if decoder.rows:
                decoder.step()
                done |= {row.request: row.ids for row in decoder.take_finished()}
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


class _Decoder:
    """The rows that are being written, in the places 0 to N of the cache."""

    def __init__(self, llm: nn.Module, settings: GenerationSettings, stop_ids: Collection[int], num_rows: int) -> None:
        self.model: Any = base_model(llm)
        self.settings, self.stop_ids, self.num_rows = settings, frozenset(stop_ids), num_rows
        self.cache = RowCache(num_rows)
        self.rows: list[CaptionRow] = []
        self.is_plain = settings.rules.repetition_penalty == 1.0 and not settings.rules.no_repeat_ngram_size

    def admit(self, waiting: Iterable[tuple[int, Tensor]]) -> int:
        """Number of newcomers, whose prompts were read and whose first token was written."""
        free = self.num_rows - len(self.rows)
        if self.rows and free < max(1, self.num_rows // _GROUP):
            return 0
        newcomers = list(islice(waiting, free))
        if newcomers:
            self._read([prompt for _, prompt in newcomers], [self._new_row(request, len(prompt)) for request, prompt in newcomers])
        return len(newcomers)

    def _new_row(self, request: int, num_prompt_tokens: int) -> CaptionRow:
        chosen = self.settings.rules
        return CaptionRow(request, num_prompt_tokens, no_repeat=chosen.no_repeat_ngram_size, lookup=chosen.speculate_ngram)

    def _read(self, prompts: list[Tensor], newcomers: list[CaptionRow]) -> None:
        # Padded on the right, so that keys stand from the first column on, and no token sees padding: it comes later than all of them.
        embeddings = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=embeddings.device)
        self.cache.expect_newcomers(len(self.rows), embeddings.shape[1])
        # The head runs on last tokens only, through the class's own forward, as some scale what it gives (HyperCLOVA X).
        handle = self.model.lm_head.register_forward_pre_hook(
            lambda _, inputs: (inputs[0][torch.arange(len(last)), last.to(inputs[0].device)].unsqueeze(1),)
        )
        try:
            logits = self.model(inputs_embeds=embeddings, past_key_values=self.cache, use_cache=True).logits
        finally:
            handle.remove()
        self._write(logits, newcomers, [[] for _ in newcomers])
        self.rows += newcomers

    def step(self) -> None:
        """Writes the next token of every row, and those behind it that were guessed rightly."""
        most = self.settings.max_new_tokens
        drafts = [row.draft(min(_DRAFT, most - len(row.ids) - 1)) for row in self.rows]
        num_tokens = 1 + max(map(len, drafts))
        device = self.model.get_input_embeddings().weight.device
        tokens = [([row.ids[-1], *draft] + [0] * num_tokens)[:num_tokens] for row, draft in zip(self.rows, drafts, strict=True)]
        lengths = [row.num_cached for row in self.rows]
        positions, mask = self.cache.expect_step(torch.tensor(lengths, device=device), max(lengths), num_tokens)
        logits = self.model(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=self._as_wanted(mask),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self._write(logits, self.rows, drafts)

    def _as_wanted(self, mask: Tensor) -> Tensor:
        """The mask as the model's attention takes it."""
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _write(self, logits: Tensor, rows: list[CaptionRow], drafts: list[list[int]]) -> None:
        """Puts the best tokens behind the rows: behind a right guess, the next one's too.

        Args:
            logits: (N, q, vocabulary), behind the last token and behind each guess.
            rows: The N rows.
            drafts: Up to q - 1 guesses of each.
        """
        best = logits.argmax(-1).tolist() if self.is_plain else None
        going = list(range(len(rows)))
        for place in range(logits.shape[1]):
            if best is not None:
                tokens = [best[index][place] for index in going]
            else:
                own = [rows[index] for index in going]
                tokens = penalised(logits[going, place], own, self.settings.rules.repetition_penalty).argmax(-1).tolist()
            right = []
            for index, token in zip(going, tokens, strict=True):
                rows[index].write(token)
                if not self._is_finished(rows[index]) and drafts[index][place : place + 1] == [token]:
                    right.append(index)
            going = right
            if not going:
                break

    def _is_finished(self, row: CaptionRow) -> bool:
        return row.ids[-1] in self.stop_ids or len(row.ids) >= self.settings.max_new_tokens

    def take_finished(self) -> list[CaptionRow]:
        """The rows that have ended; the last of the others take their places."""
        finished = [row for row in self.rows if self._is_finished(row)]
        count = len(self.rows) - len(finished)
        free = [index for index, row in enumerate(self.rows[:count]) if self._is_finished(row)]
        movers = [index for index in range(count, len(self.rows)) if not self._is_finished(self.rows[index])]
        self.cache.move_rows(movers, free)
        for source, target in zip(movers, free, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[count:]
        return finished


class CaptionRow:
    """What a row of the batch has written.

    Args:
        request: Number of its clip.
        num_prompt_tokens: Before the caption.
        no_repeat: Length of n-grams that come once; 0 lets them repeat.
        lookup: Length of the n-grams by which the text to come is looked up in the text so far; 0 guesses nothing.
    """

    def __init__(self, request: int, num_prompt_tokens: int, *, no_repeat: int = 0, lookup: int = 0) -> None:
        self.request, self.num_prompt_tokens = request, num_prompt_tokens
        self.no_repeat, self.lookup = no_repeat, lookup
        self.ids: list[int] = []
        self.used: set[int] = set()
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of the first no_repeat - 1 tokens of an n-gram
        self._places: dict[tuple[int, ...], int] = {}  # where the text goes on behind the latest n-gram

    @property
    def num_cached(self) -> int:
        """Tokens whose keys the cache holds: all but the last, which the next step reads."""
        return self.num_prompt_tokens + len(self.ids) - 1

    def write(self, token: int) -> None:
        """Puts a token behind the text."""
        self.ids.append(token)
        self.used.add(token)
        if self.no_repeat and len(self.ids) >= self.no_repeat:
            self._followers.setdefault(tuple(self.ids[-self.no_repeat : -1]), []).append(token)
        if self.lookup and len(self.ids) > self.lookup:
            self._places[tuple(self.ids[-self.lookup - 1 : -1])] = len(self.ids) - 1

    def banned(self) -> Sequence[int]:
        """Tokens that would repeat an n-gram."""
        known = len(self.ids) - (self.no_repeat - 1)
        return self._followers.get(tuple(self.ids[known:]), ()) if self.no_repeat and known >= 0 else ()

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that came behind the last n-gram when it stood there before, a text that goes in circles read on and on.

        Prompt lookup decoding (Saxena, https://github.com/apoorvumang/prompt-lookup-decoding), on the caption itself.
        """
        place = self._places.get(tuple(self.ids[-self.lookup :])) if self.lookup else None
        if place is None:
            return []
        tokens: list[int] = []
        for index in range(place, place + limit):
            tokens.append(self.ids[index] if index < len(self.ids) else tokens[index - len(self.ids)])
        return tokens


def penalised(logits: Tensor, rows: Sequence[CaptionRow], penalty: float) -> Tensor:
    """Logits (N, vocabulary), float32, after repetition penalty and n-gram ban, as transformers' processors leave them.

    Args:
        logits: (N, vocabulary).
        rows: The N captions so far.
        penalty: Divides the logits above 0 of tokens that were used, and multiplies those below (Keskar et al.,
            https://arxiv.org/abs/1909.05858); 1 changes nothing.
    """
    logits = logits.to(torch.float32, copy=True)
    if penalty != 1.0:
        used = _places([row.used for row in rows], logits.device)
        found = logits[used]
        logits[used] = torch.where(found < 0, found * penalty, found / penalty)
    logits[_places([row.banned() for row in rows], logits.device)] = -torch.inf
    return logits


def _places(tokens: Sequence[Sequence[int] | set[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of rows and tokens."""
    pairs = [(row, token) for row, own in enumerate(tokens) for token in own]
    index = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2)
    return index[:, 0], index[:, 1]
