"""How many layers keep their activations within `hardware.activation_budget_gib`: each one kept is one not computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmcap.config import Config

if TYPE_CHECKING:
    from vlmcap.planning.estimate.traces import Tracer
    from vlmcap.planning.memory import Stage


def num_kept_layers(config: Config) -> int:
    """Last layers of the language model that are not computed again; 0 where there is no budget.

    Raises:
        UserError: The parts do not fit together, or the architecture is not known.
    """
    if config.hardware.activation_budget_gib is None or not config.hardware.gradient_checkpointing:
        return 0
    from vlmcap.planning.cards import card_of
    from vlmcap.planning.estimate.traces import Tracer

    return kept_within(config, Tracer(config, card_of(config.hardware.name, config.hardware.memory_gib).has_flash))


def kept_within(config: Config, tracer: Tracer) -> int:
    """The same, with the traces at hand."""
    from vlmcap.planning.cards import GIB
    from vlmcap.planning.memory import activations, training_peak

    budget = config.hardware.activation_budget_gib
    if budget is None or not config.hardware.gradient_checkpointing:
        return 0
    accumulates = config.trainer.accumulate_grad_batches > 1

    def needed(num_kept: int) -> float:
        stages = training_stages(config, tracer, num_kept)
        return activations(training_peak(stages, {}, config.optim.kind.value, accumulates=accumulates))

    most = tracer.depth - tracer.fewest_again
    return next((kept for kept in range(most, 0, -1) if needed(kept) <= budget * GIB), 0)


def training_stages(config: Config, tracer: Tracer, num_kept: int) -> list[Stage]:
    """The stages of a training step, the encoder left out where its features are stored."""
    from vlmcap.planning.memory import Stage

    language = tracer.language(config.data.batch_size, config.llm.max_caption_tokens, num_kept)
    return [*stages_in_front(config, tracer, config.data.batch_size), Stage("language model", language)]


def stages_in_front(config: Config, tracer: Tracer, num_clips: int) -> list[Stage]:
    """What clips go through in front of the language model."""
    from vlmcap.planning.memory import Stage

    first = [] if config.cache.enabled is True else [Stage("encoder", tracer.encoder(num_clips))]
    return [*first, Stage("projector", tracer.projector(num_clips))]
