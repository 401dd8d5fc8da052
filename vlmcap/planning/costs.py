"""Seconds and bytes of a configuration, from arithmetic and from what memory can move."""

from __future__ import annotations

from vlmcap.planning.cards import Card

UNPACKED_BYTES = 2.5  # moved for a 4-bit weight that a product unpacks: half a byte read, two written
READ_AGAIN = 2  # bytes: then the product reads it
CAPTION_SHARE = 0.6  # of the longest caption: the mean one, as in the Korean data


def training_seconds(flops: float, packed_bytes: float, card: Card, *, is_checkpointed: bool) -> float:
    """Seconds of a step.

    Args:
        flops: Of the step.
        packed_bytes: Of 4-bit weights, half a byte each, which every pass unpacks.
        card: That it runs on.
        is_checkpointed: The forward pass runs twice.
    """
    passes = 3 if is_checkpointed else 2
    moved = passes * 2 * packed_bytes * UNPACKED_BYTES
    return flops / (card.utilisation * card.peak_flops) + moved / card.bytes_per_s


def caption_seconds(flops: float, weight_bytes: float, packed_bytes: float, cache_bytes: float, max_tokens: int, card: Card) -> float:
    """Seconds to caption a batch: its prompt by arithmetic, then for each token all weights and the cache through the memory.

    Args:
        flops: Of the prompt's pass.
        weight_bytes: Of all weights as they are stored.
        packed_bytes: Of them, in 4 bits.
        cache_bytes: Keys and values at a caption's middle.
        max_tokens: The longest caption, which ends the batch.
        card: That it runs on.
    """
    token_s = token_seconds(weight_bytes, packed_bytes, cache_bytes, card)
    return flops / (card.utilisation * card.peak_flops) + CAPTION_SHARE * max_tokens * token_s


def token_seconds(weight_bytes: float, packed_bytes: float, cache_bytes: float, card: Card) -> float:
    """Seconds of one token of every clip of a batch; arguments as of `caption_seconds`."""
    unpacking = 2 * packed_bytes * (UNPACKED_BYTES - 0.5 + READ_AGAIN)
    return (weight_bytes + unpacking + cache_bytes) / (card.bandwidth_share * card.bytes_per_s)
