"""Columns of text, of prompts and answers, or of messages, as one: plain text, or conversations. Never a token."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset

from spry_app.config import DataConfig
from spry_app.errors import SpryError
from spry_app.tasks.columns import require, text, whole

ASSISTANT = "assistant"
_PAIR, _MESSAGES = ("prompt", "completion"), "messages"
"""What TRL and many a data set on the Hub call such columns."""
_TURN = pa.struct({"role": pa.string(), "content": pa.string(), "answer": pa.bool_()})
Turns = list[dict[str, Any]]


def columns(raw: Dataset, config: DataConfig, where: str) -> dict[str, Any]:
    """ "text", or "turns": lists of {"role", "content", "answer"}, the last of which tells what is to be learned.

    Columns that the config names come first, then messages, then prompt and completion, then data.text-field. Raises
    SpryError.
    """
    pair, messages = (config.prompt_field, config.answer_field), config.messages_field
    if any(pair) and (messages or not all(pair)):
        raise SpryError(
            f"data.prompt-field is {pair[0]!r}, data.answer-field {pair[1]!r} and data.messages-field {messages!r}: "
            "set the first two, or the third alone, or none of them."
        )
    if not (any(pair) or messages):
        messages = _MESSAGES if _MESSAGES in raw.column_names else ""
        pair = _PAIR if not messages and set(_PAIR) <= set(raw.column_names) else ("", "")
    if messages:
        require(raw, {"data.messages-field": messages}, where)
        return {"turns": _turns(_conversations(raw, "data.messages-field", messages, where))}
    if any(pair):
        keys = ("data.prompt-field", "data.answer-field")
        require(raw, dict(zip(keys, pair, strict=True)), where)
        asked, said = (_said(raw, *side, where) for side in zip(keys, pair, ("user", ASSISTANT), strict=True))
        return {"turns": _turns([*_unlearned(a), *b] for a, b in zip(asked, said, strict=True))}
    require(raw, {"data.text-field": config.text_field}, where)
    return {"text": text(raw, "data.text-field", config.text_field, where)}


def _turns(conversations: Iterable[Turns]) -> pa.Array:
    return pa.array(list(conversations), pa.list_(_TURN))


def _unlearned(turns: Turns) -> Turns:
    return [{**turn, "answer": False} for turn in turns]


def _said(raw: Dataset, key: str, field: str, role: str, where: str) -> Iterator[Turns]:
    """A column of texts, names of classes, or lists of messages: what one side says."""
    feature = raw.features[field]
    if isinstance(feature, ClassLabel):
        texts = [feature.names[value] for value in whole(raw, key, field, where).to_pylist()]
    elif getattr(feature, "dtype", "") in ("string", "large_string"):
        texts = text(raw, key, field, where).to_pylist()
    else:
        yield from _conversations(raw, key, field, where, role != ASSISTANT, role == ASSISTANT)
        return
    yield from ([{"role": role, "content": said, "answer": role == ASSISTANT}] for said in texts)


def _conversations(
    raw: Dataset, key: str, field: str, where: str, opening: bool = True, answering: bool = True
) -> Iterator[Turns]:
    """Lists of {"role", "content"}. opening: none may begin with an answer. answering: all must hold one."""
    for row, messages in enumerate(whole(raw, key, field, where).to_pylist(), 1):
        at = f"{key} {field!r} in row {row} of {where}"
        if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
            raise SpryError(f'{at} is not a list of {{"role": ..., "content": ...}} with texts; it must be one.')
        turns = [{"role": m["role"], "content": m["content"], "answer": m["role"] == ASSISTANT} for m in messages]
        if answering and not any(turn["answer"] for turn in turns):
            raise SpryError(f"{at} has no message of the role {ASSISTANT!r}, so there is nothing to learn from it.")
        if opening and turns[0]["answer"]:
            raise SpryError(f"{at} begins with the role {ASSISTANT!r}; somebody must have said something before.")
        yield turns


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(part), str) for part in ("role", "content"))
