"""Cards as plain figures, from their data sheets and from what PyTorch reports on them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
CORE_FLOPS = 60e9  # float32 on one core: measured with CLIP-L's layers on a server CPU


@dataclass(frozen=True, slots=True)
class Card:
    """What a plan needs to know of a card.

    Attributes:
        usable_gib: Memory that PyTorch reports, which is less than the name says.
        peak_flops: Dense half-precision operations a second.
        bytes_per_s: Of its memory.
        has_flash: Compute capability 8.0 or newer.
        context_gib: The CUDA context, and the kernels and workspaces of cuBLAS and cuDNN.
    """

    usable_gib: float
    peak_flops: float
    bytes_per_s: float
    has_flash: bool = True
    context_gib: float = 0.6


CARDS = {
    "t4": Card(14.6, 65e12, 320e9, has_flash=False),
    "l4": Card(22.0, 121e12, 300e9),
    "a100": Card(39.4, 312e12, 1555e9),
    "a100_80": Card(79.1, 312e12, 2039e9),
    "h100": Card(79.1, 989e12, 3350e9, context_gib=0.8),
}


def card_of(hardware: str, memory_gib: float, num_cores: int | None = None) -> Card:
    """The card of a hardware profile; one without an entry counts as an L4 of its size.

    Args:
        hardware: Name under `conf/hardware`.
        memory_gib: Of the profile.
        num_cores: Of a CPU; None for a card.
    """
    if num_cores is not None:
        return Card(memory_gib, num_cores * CORE_FLOPS, num_cores * 8e9, context_gib=0.0)
    known = CARDS.get(hardware)
    return known or Card(0.92 * memory_gib, CARDS["l4"].peak_flops, CARDS["l4"].bytes_per_s)
