"""Questions and their contexts as tokens, a long context in several windows that overlap. What a model makes of them is
not known here.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from spry_app.errors import SpryError

_ROWS_AT_ONCE = 1000
"""Rows tokenised together: what the tokenizer says of a token takes far more memory than what is kept of it."""

Offsets = npt.NDArray[np.int32]
"""(tokens, 2): the characters of the context from which each token is; -1 for every other token."""


class Window(NamedTuple):
    """A question with a part of its context.

    question: its number. features: tokenizer output by name (input_ids, attention_mask, ...). start, end: tokens of
    the answer, both `none`, the token that stands for "no answer", where the part does not hold all of it.
    """

    question: int
    features: dict[str, list[int]]
    offsets: Offsets
    none: int
    start: int
    end: int


def room_for_question(tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> int:
    """Tokens that a question may have. Raises SpryError where there is none, or the tokenizer cannot make windows."""
    most = max_length - tokenizer.num_special_tokens_to_add(pair=True) - max(1, 2 * stride)
    if most < 1:
        raise SpryError(
            f"data.max-length is {max_length} and data.stride is {stride}, which leaves no token for a question: raise "
            f"data.max-length to {max_length + 1 - most} at least (for SQuAD 384 is usual), or lower data.stride."
        )
    if not tokenizer.is_fast:
        raise SpryError(
            f"The tokenizer of model.name is a {type(tokenizer).__name__}, which cannot tell where in a text its "
            "tokens lie, as question answering needs to know: take a checkpoint that has a tokenizer.json."
        )
    return most


def shortened(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    """Of each its beginning that is at most so many tokens long."""
    found = list(questions)
    long = list(range(len(found)))
    while long:  # what is left of a text may have other tokens than it had there
        some = [found[number] for number in long]
        tokens = tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = dict(zip(long, tokens["offset_mapping"], strict=True))
        long = [number for number in long if len(offsets[number]) > most]
        for number in long:
            found[number] = found[number][: offsets[number][most][0]]
    return found


def windows(
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[tuple[int, str] | None],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
) -> Iterator[Window]:
    """Those of the first question, then those of the next. answers: first character and text of each.

    A window has at most `max_length` tokens; two that follow one another share `stride` of the context, so that an
    answer of at most stride + 1 tokens is whole in one of them.
    """
    for begin in range(0, len(questions), _ROWS_AT_ONCE):
        some = slice(begin, begin + _ROWS_AT_ONCE)
        tokens = tokenizer(
            questions[some],
            contexts[some],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        places, origins = tokens.pop("offset_mapping"), tokens.pop("overflow_to_sample_mapping")
        for number, (place, row) in enumerate(zip(places, origins, strict=True)):
            features = {name: values[number] for name, values in tokens.items()}
            context = np.array([part == 1 for part in tokens.sequence_ids(number)])
            offsets = np.where(context[:, None], np.array(place, np.int32), np.int32(-1))
            none, answer = _no_answer(features["input_ids"], tokenizer.cls_token_id), answers[begin + row]
            tokens_of_answer = _tokens_of(offsets, *answer) if answer else None
            yield Window(begin + row, features, offsets, none, *(tokens_of_answer or (none, none)))


def _no_answer(ids: Sequence[int], cls: int | None) -> int:
    """The classification token, or the first where the tokenizer has none."""
    return ids.index(cls) if cls in ids else 0


def _tokens_of(offsets: Offsets, first: int, text: str) -> tuple[int, int] | None:
    """First and last token of the answer `text` that begins at character `first`; None where not all of it is here."""
    start, end = first + len(text) - len(text.lstrip()), first + len(text.rstrip())
    part = offsets[offsets[:, 0] >= 0]
    held = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    if not held.size or part[0, 0] > start or part[-1, 1] < end:
        return None
    return int(held[0]), int(held[-1])
