"""The tiny language model of the demo: a real class, trained from nothing on the demo captions, made once.

The tiny parts stand in for published checkpoints, so that fine-tuning on a CPU is what it is on a GPU: a frozen encoder
that knows pictures, a language model that knows Korean and how to use what stands before it, and a projector that must
join the two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmcap.models.rates import cosine_rate

Progress = Callable[[int, int], None]

RECIPE = 2  # raise when what is made changes
LANGUAGE_STEPS, ENCODER_STEPS = 400, 700  # of the demo at full size; about a minute each on two cores
_VOCABULARY = 640
# ChatML, as Qwen's: "<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n".
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LANGUAGE_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": _VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""Of the tiny language model, as a `config.json` has it."""


def train_tokenizer(texts: Sequence[str], prompt: str) -> Any:
    """Trains a byte-level BPE tokenizer with a chat template, in transformers' class.

    The prompt's words are in its vocabulary too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be written, known word or not
        show_progress=False,
    )
    # The texts of a chat are as frequent as captions, so that they become few tokens.
    tokenizer.train_from_iterator([*texts, *[f"user\n{prompt}", "assistant\n"] * len(texts)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.chat_template = _TEMPLATE
    return fast


def make_language_model(
    folder: Path, texts: Sequence[str], *, prompt: str, num_steps: int, seed: int, progress: Progress
) -> None:
    """Trains a Qwen3 of 0.7 M parameters on captions alone and saves it with its tokenizer.

    Each example is a chat in which the user's turn holds the caption's words in disorder and with gaps, and the answer
    is the caption. So the model learns Korean sentences, and to say what its context holds: what projected video will
    have to speak to.

    Args:
        folder: Where to save.
        texts: Captions of the training split.
        prompt: The question in the user's turn, as in fine-tuning.
        num_steps: Optimiser steps of 16 examples.
        seed: Of weights and examples.
        progress: Called with steps done and steps in all.
    """
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = train_tokenizer(texts, prompt)
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = Qwen3ForCausalLM(
            Qwen3Config(
                **(LANGUAGE_CONFIG | {"vocab_size": len(tokenizer)}),
                initializer_range=0.08,  # about width ** -0.5; with the usual 0.02 attention learns to copy much later
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # `optimise` sets the rate of each step.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01)
        for step in range(num_steps):
            ids, labels = _chat_batch(tokenizer, rng.choices(texts, k=16), prompt, rng)
            mask = (ids != tokenizer.pad_token_id).long()
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimise(optimizer, loss, cosine_rate(step, num_steps, peak=6e-3, warmup_steps=30, final_ratio=0.05))
            progress(step + 1, num_steps)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _chat_batch(tokenizer: Any, texts: Sequence[str], prompt: str, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Returns ids and labels (B, S) of chats that ask for `texts` from their scattered words.

    Labels are -100 outside the answer.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for text in texts:
        # A tenth of the words is left out, so that the model cannot only reorder.
        words = [word for word in text.split() if rng.random() > 0.1]
        rng.shuffle(words)
        chat = [{"role": "user", "content": f"{' '.join(words)}\n{prompt}"}]
        question = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))[
            "input_ids"
        ]
        rows.append((question, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]))
    # Shorter rows are padded on the right.
    width = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    labels = torch.full((len(rows), width), -100)  # -100: no loss
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
    return ids, labels


def optimise(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """Takes one step at a learning rate, with gradients clipped to a norm of 1."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
