"""The examples in the docstrings of the public API, which the documentation shows, run and print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

from tests.plugins import own_registries

MODULES = {
    "vlmcap.metrics.scores": "score_captions",
    "vlmcap.metrics.significance": "paired_bootstrap",
    "vlmcap.metrics.tokenizers": "get_tokenizer",
    "vlmcap.metrics.user_metrics": "register_metric",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_is_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(name)
    assert ">>>" in getattr(module, MODULES[name]).__doc__
    with own_registries(monkeypatch):
        assert doctest.testmod(module).failed == 0
