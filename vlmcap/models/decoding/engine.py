"""Greedy decoding of many clips in a few slots, none of which is idle while clips wait.

A step of the language model costs nearly the same for one caption as for many, and captions differ in length: in static
batches, those that have ended wait for the longest. Here, a waiting clip takes the slot of a caption that has ended, as
in continuous batching (Yu et al., Orca, https://www.usenix.org/conference/osdi22/presentation/yu).

Everything that a step reads and writes stays on the device, and its shapes are few, so that it can be captured as a
CUDA graph.

Legend: R slots, N slots of one call, S sequence, q tokens per slot in one step, Dl language width.
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

from vlmcap.models.decoding.cache import SlotCache
from vlmcap.models.decoding.graphs import CapturedSteps, Graphs
from vlmcap.models.decoding.texts import SlotTexts
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import FLASH, PACKABLE, REPEATED

if TYPE_CHECKING:
    from vlmcap.models.decoding.settings import GenerationSettings

_NUM_DRAFT_TOKENS = 4  # draft tokens of a step: every slot pays for them
_ADMIT_FRACTION = 8  # prompts are admitted when 1/8 of the slots is free, as prefilling them one by one would be slower
PROMPT_TOKENS = 8192  # tokens of prompts in one prefill: they keep a GPU busy, and more would only take memory
# Steps between two polls for captions that have ended. A poll makes the host wait for the GPU; in between, a finished
# slot idles for half of these steps, 2 % of a caption of 400 tokens. On a CPU a poll costs nothing.
POLL_EVERY = 16
# A step attends to a multiple of this many columns: a captured step has one shape, and a caption of 768 tokens meets
# four shapes of this size, while the columns beyond the longest slot are a few per cent of all.
_BLOCK, _CPU_BLOCK = 256, 8  # CPU kernels want mask rows of a multiple of 8
_ATTENTION = ("sdpa", REPEATED, "eager", *FLASH)
_ROTARY = ("default", "linear", "llama3", "yarn")  # other types change the angles of all slots with the longest one
# Fields of generation_config.json, besides those that vlmcap sets, which change what transformers' generate returns.
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


def native_engine_obstacle(llm: nn.Module) -> str:
    """Returns why `greedy_ids` would not match transformers' greedy search; empty if it does.

    Every layer must attend to all keys, and nothing but the logits may decide on a token.
    """
    model: Any = base_model(llm)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "lm_head"):
        return "the language model is not a class of transformers with an lm_head"
    if config._attn_implementation not in _ATTENTION:
        return f"llm.attention={config._attn_implementation} is not one of {', '.join(_ATTENTION)}"
    return _config_obstacle(config, getattr(model, "generation_config", None))


def supports_native_engine(config: Any, generation_config: Any) -> bool:
    """Returns whether `greedy_ids` can decode a language model, judged by its configuration without weights.

    Args:
        config: transformers' configuration of the language model.
        generation_config: Its generation settings; None if it has none.
    """
    return not _config_obstacle(config, generation_config)


def _config_obstacle(config: Any, generation_config: Any) -> str:
    if config.model_type not in PACKABLE:
        return f"the class {config.model_type} is not known to keep the clips of a batch apart"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in _ROTARY:
        return f"its rope_type={rotary} changes all captions of a batch with the longest one"
    # transformers chooses the type of each layer's cache by the configuration.
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers):
        return "some of its layers use a sliding window"
    extras = [name for name in _EXTRAS if getattr(generation_config, name, None)]
    return f"its generation_config.json sets {', '.join(extras)}" if extras else ""


@torch.no_grad()
def greedy_ids(
    llm: nn.Module,
    prompts: Iterable[Tensor],
    settings: GenerationSettings,
    stop_ids: Collection[int],
    num_slots: int,
    graphs: Graphs | None = None,
) -> list[list[int]]:
    """Decodes captions greedily, as transformers' greedy search does.

    Args:
        llm: Causal language model without a `native_engine_obstacle`, with or without adapters.
        prompts: Input embeddings (S, Dl) of each clip, without padding; consumed as slots become free.
        settings: Maximum length, repetition controls and n-gram speculation.
        stop_ids: Tokens that end a caption.
        num_slots: Captions that are decoded at a time.
        graphs: Captures steps as graphs; None runs them eagerly.

    Returns:
        Ids of the captions in the order of the prompts, each up to and including its first end token.
    """
    decoder = _Decoder(llm, settings, stop_ids, num_slots, graphs)
    queue = _PromptQueue(prompts)
    done: dict[int, list[int]] = {}
    with _masked_attention(decoder.model.config):
        # `admit` is called first, so that waiting prompts fill the slots that have become free.
        while decoder.admit(queue) or decoder.slots:
            # A caption may end with the token of its prefill.
            done |= decoder.take_finished()
            if decoder.slots:
                decoder.advance()
                done |= decoder.take_finished()
    # Requests are numbered in the order of the prompts.
    return [done[request] for request in range(len(done))]


@contextmanager
def _masked_attention(config: Any) -> Iterator[None]:
    """Replaces FlashAttention by PyTorch's attention, as it takes no mask in which each slot ends at its own column."""
    chosen = config._attn_implementation
    if chosen not in FLASH:
        yield
        return
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = chosen


class _PromptQueue:
    """Numbered prompts, of which the next one can be inspected before it is taken."""

    def __init__(self, prompts: Iterable[Tensor]) -> None:
        self._prompts = enumerate(prompts)
        self._next: tuple[int, Tensor] | None = None

    def take(self, max_prompts: int) -> list[tuple[int, Tensor]]:
        """Takes up to `max_prompts` prompts of at most `PROMPT_TOKENS` tokens with padding, but at least one if any."""
        taken: list[tuple[int, Tensor]] = []
        longest = 0
        while len(taken) < max_prompts:
            if self._next is None:
                self._next = next(self._prompts, None)
            if self._next is None:
                break
            longest = max(longest, len(self._next[1]))
            # Tokens after padding to the longest prompt, which the prefill has to compute.
            if taken and longest * (len(taken) + 1) > PROMPT_TOKENS:
                break
            taken.append(self._next)
            self._next = None
        return taken


@dataclass
class _Slot:
    """What the host knows of a slot in use.

    Attributes:
        request: Number of its clip.
        num_prompt_tokens: Tokens before the caption.
        num_generated: Tokens of the caption at the last poll.
    """

    request: int
    num_prompt_tokens: int
    num_generated: int = 1


class _Decoder:
    """Decodes the captions in slots 0 to N of the cache."""

    def __init__(
        self,
        llm: nn.Module,
        settings: GenerationSettings,
        stop_ids: Collection[int],
        num_slots: int,
        graphs: Graphs | None = None,
    ) -> None:
        model: Any = base_model(llm)
        self.model, self.num_slots, self.max_new_tokens = model, num_slots, settings.max_new_tokens
        device = model.get_input_embeddings().weight.device
        self.is_on_cpu = device.type == "cpu" and graphs is None
        self.poll_every, self.block = (1, _CPU_BLOCK) if self.is_on_cpu else (POLL_EVERY, _BLOCK)
        self.cache, self.texts = SlotCache(num_slots), SlotTexts(num_slots, settings, stop_ids, device)
        self.steps = CapturedSteps(graphs)
        self.slots: list[_Slot] = []
        self._is_polled = True

    def admit(self, queue: _PromptQueue) -> int:
        """Prefills waiting prompts into free slots and decodes their first tokens; returns how many were admitted."""
        before = len(self.slots)
        # Unless the decoder is empty, wait until enough slots are free.
        if before and self.num_slots - before < max(1, self.num_slots // _ADMIT_FRACTION):
            return 0
        while taken := queue.take(self.num_slots - len(self.slots)):
            self._prefill([prompt for _, prompt in taken])
            self.slots += [_Slot(request, len(prompt)) for request, prompt in taken]
        return len(self.slots) - before

    def _prefill(self, prompts: list[Tensor]) -> None:
        # Right-padded, so that keys start at the first column, and causal attention hides the padding.
        embeddings = nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # N × (S, Dl) -> (N, S, Dl)
        first, width = len(self.slots), embeddings.shape[1]
        # Captured graphs work on the old buffers.
        if self.cache.reserve(_round_up(width + self.max_new_tokens + _NUM_DRAFT_TOKENS, self.block)):
            self.steps.forget()
        self.cache.expect_prompts(first, width)
        for slot, prompt in enumerate(prompts, first):
            self.texts.start(slot, len(prompt))

        def keep_last_tokens(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            # The last real token of each prompt, before its padding.
            last = [hidden[len(prompt) - 1] for hidden, prompt in zip(inputs[0], prompts, strict=True)]
            return (torch.stack(last)[:, None],)  # (N, S, Dl) -> (N, 1, Dl)

        # The class's own forward calls the head, because some classes scale its output (HyperCLOVA X).
        handle = self.model.lm_head.register_forward_pre_hook(keep_last_tokens)
        try:
            logits = self.model(inputs_embeds=embeddings, past_key_values=self.cache, use_cache=True).logits
        finally:
            handle.remove()
        # No drafts in a prefill: a tensor of zero columns.
        self.texts.write(logits, logits.new_empty(len(prompts), 0), first)
        self._is_polled = False

    def advance(self) -> None:
        """Decodes further tokens in every slot, until the next poll."""
        # On a GPU a power of two, so that there are few shapes to capture; the slots beyond are computed for nothing.
        count = len(self.slots) if self.is_on_cpu else min(self.num_slots, 1 << (len(self.slots) - 1).bit_length())
        num_tokens = 1 + (_NUM_DRAFT_TOKENS if self.texts.ngram_size else 0)
        # No more steps than the slot with the most tokens left can use.
        num_steps = min(self.poll_every, self.max_new_tokens - min(slot.num_generated for slot in self.slots))
        ahead = (num_steps - 1) * num_tokens  # tokens that a slot may have added before the last of the steps
        longest = max(
            slot.num_prompt_tokens + min(slot.num_generated + ahead, self.max_new_tokens) for slot in self.slots
        )
        width = min(_round_up(longest - 1 + num_tokens, self.block), self.cache.num_columns)
        # The width stays the same until the next poll, although captions grow, so that all steps have one shape.
        for _ in range(num_steps):
            self.steps.run((count, width), partial(self._step, count, width))
        self._is_polled = False

    def _step(self, count: int, width: int) -> None:
        """Decodes the next token of the first `count` slots, and the draft tokens that it confirms."""
        drafts = self.texts.drafts(count, _NUM_DRAFT_TOKENS)
        # Without any draft, a step of one token costs less. A GPU would have to wait for the answer.
        if self.is_on_cpu and drafts.numel() and not bool((drafts >= 0).any()):
            drafts = drafts[:, :0]
        # -1 stands for no draft; token 0 takes its place, and cannot be confirmed.
        tokens = torch.cat([self.texts.last(count), drafts.clamp(min=0)], dim=1)  # (N, 1), (N, K) -> (N, q)
        positions, mask = self.cache.expect_step(self.texts.num_cached(count), width, tokens.shape[1])
        logits = self.model(
            input_ids=tokens,
            attention_mask=self._convert_mask(mask),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.texts.write(logits, drafts)

    def _convert_mask(self, mask: Tensor) -> Tensor:
        """Converts a bool mask for eager attention, which adds it to the scores."""
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        # (N, 1, q, S) bool -> 0 where a token attends, the smallest number elsewhere
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def take_finished(self) -> dict[int, list[int]]:
        """Frees the slots of captions that have ended, and moves the last of the others into them.

        Returns:
            Ids of the finished captions by the number of their clip.
        """
        if self._is_polled:
            return {}
        self._is_polled = True
        # 1. One transfer to the host reports how long each caption is and whether it has ended.
        texts, num_slots = self.texts, len(self.slots)
        # (2, N) int64
        counts, ends = torch.stack([texts.counts[:num_slots], texts.is_done[:num_slots].long()]).tolist()
        for slot, count in zip(self.slots, counts, strict=True):
            slot.num_generated = count
        finished = [index for index in range(num_slots) if ends[index]]
        if not finished:
            return {}
        # 2. The ids of finished captions are copied to the host.
        ids = torch.stack([texts.ids[index] for index in finished]).tolist()
        done = {self.slots[index].request: tokens[: counts[index]] for index, tokens in zip(finished, ids, strict=True)}
        # 3. The remaining captions move to the front, so that steps run on the first slots only.
        num_left = num_slots - len(finished)
        # Free slots among the first `num_left` take the captions from the slots behind them; both lists have one
        # length.
        free = [index for index in finished if index < num_left]
        movers = [index for index in range(num_left, num_slots) if not ends[index]]
        self.cache.move_slots(movers, free)
        for source, target in zip(movers, free, strict=True):
            texts.move(source, target)
            self.slots[target] = self.slots[source]
        # Empty slots are marked as done, so that steps with more slots than captions write nothing there.
        texts.is_done[num_left:num_slots] = True
        del self.slots[num_left:]
        return done


def _round_up(number: int, block: int) -> int:
    return -(-number // block) * block
