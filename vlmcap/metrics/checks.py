"""The one check of captions to be scored, told in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from vlmcap.errors import UserError


def check_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Passes if there is one prediction a clip, and at least one reference for each; empty texts are allowed.

    Raises:
        UserError: There is no clip, the numbers differ, a text is None or no text, or a clip has no reference.
    """
    for name, given in (("predictions", predictions), ("references", references)):
        if not _is_list(given):
            raise UserError(f"{name} must be a list with an entry for each clip, got {_kind(given)}.")
    if len(predictions) != len(references):
        raise UserError(f"There are {len(predictions)} predictions but {len(references)} lists of references: each clip needs one of both.")
    if len(predictions) == 0:
        raise UserError("There are no captions to score: give at least one prediction with its references.")
    for index, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise UserError(f"The prediction of clip {index} is {_kind(prediction)}: give a text, empty if the model said nothing.")
        if not _is_list(refs):
            raise UserError(f"The references of clip {index} are {_kind(refs)}: give a list of texts, also for a single one.")
        if len(refs) == 0:
            raise UserError(f"Clip {index} has no reference: leave it out or give it one.")
        for reference in refs:
            if not isinstance(reference, str):
                raise UserError(f"A reference of clip {index} is {_kind(reference)}: give a text.")


def _is_list(value: object) -> bool:
    # A text is a sequence of texts to Python: every character of a lone reference would silently become a reference.
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "a single text"
    return "None" if value is None else f"a {type(value).__name__}"
