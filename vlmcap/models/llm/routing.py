"""The choice of experts, kept from one run of a model for the next.

Two almost equal experts change places by a rounding error, and the token's output with them; a comparison of two sets of weights in 16 bit
says something only where both send each token to the same experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlmcap.models.llm.adapt import is_router


class Routing:
    """What the routers of a model gave; they must be the same modules in both runs.

    Args:
        model: Causal language model, with or without adapters, which routers never have; one without experts has no routers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for name, module in model.named_modules() if is_router(model, name, module)]
        self._outputs: dict[nn.Module, Any] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps what the routers give in one forward pass."""

        def keep(router: nn.Module, _: Any, output: Any) -> None:
            self._outputs[router] = output

        handles = [router.register_forward_hook(keep) for router in self.routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Puts what was kept in the place of what the routers give, for the same tokens."""
        handles = [router.register_forward_hook(lambda module, _, __: self._outputs[module]) for router in self.routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
