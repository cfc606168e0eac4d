"""Conversations as text by a chat template, and which of their tokens a model is to say. Never a batch.

A conversation is a list of {"role", "content", "answer"}: what is said, and whether the model is to learn to say it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from spry_app.errors import SpryError

Turn = Mapping[str, Any]
Span = tuple[int, int]
"""The characters from, to."""
_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
"""What transformers looks for in a template that itself marks what the model is to say."""

PLAIN = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)
"""For a tokenizer without a chat template of its own: each turn below a line that says whose it is, an answer followed
by the end of text. It becomes the tokenizer's, and is saved with the adapter.
"""


def give_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """PLAIN, after whatever the tokenizer begins every text with; nothing where it has a template."""
    if not tokenizer.chat_template:
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN


def examples(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[bool]]]:
    """The tokens of a conversation, and which of them the model is to say: those with a character of what the template
    marks as its own (`{% generation %}`); where it marks nothing, of an answer, and the mark that ends it.

    One example; but one an answer, each with what was said before, where the template writes a turn otherwise once
    another has followed (it leaves out what was thought, say). Raises SpryError for a template that will not do.
    """
    if not tokenizer.is_fast:
        raise SpryError(
            f"The tokenizer of this model ({type(tokenizer).__name__}) does not tell which characters a token stands "
            "for, so answers cannot be told from prompts: take a model with a fast tokenizer, or plain text."
        )
    answers = [number for number, turn in enumerate(turns) if turn["answer"]]
    find = _marked if _MARKED.search(tokenizer.get_chat_template()) else _between
    whole, _ = _written(turns, tokenizer)
    found = [find(turns, number, tokenizer) for number in answers]
    if all(whole.startswith(text) for text, _ in found):
        yield _tokens(whole, [span for _, spans in found for span in spans], tokenizer)
        return
    for text, spans in found:
        yield _tokens(text, spans, tokenizer)


def _marked(turns: Sequence[Turn], number: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The conversation up to answer `number`, and what the template marks of that. Other answers are found by calls of
    their own, if they are to be learned at all.
    """
    before, _ = _written(turns[:number], tokenizer)
    text, spans = _written(turns[: number + 1], tokenizer)
    begin = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False)))
    found = [span for span in spans if span[0] >= begin]
    return text[: max([len(text.rstrip()), *(last for _, last in found)])], found


def _between(turns: Sequence[Turn], number: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The same of a template without marks: what it writes after it has asked for an answer. White space that only
    parts that from the next turn is left out: nobody waits for it.
    """
    before, _ = _written(turns[:number], tokenizer, asking=True)
    text, _ = _written(turns[: number + 1], tokenizer)
    if not text.startswith(before):
        raise SpryError(
            "The chat template of the tokenizer asks for an answer in other words than it writes one, so nobody can "
            "tell where the answer begins: take a tokenizer with another chat template, one that marks answers by "
            "{% generation %}, or one without."
        )
    return text.rstrip(), [(len(before), len(text.rstrip()))]


def _written(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, asking: bool = False) -> tuple[str, list[Span]]:
    """Turns as the template writes them, and what of that it marks."""
    said = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    template = tokenizer.get_chat_template()
    try:
        # What tokenizer.apply_chat_template calls, which keeps the places of the marks to itself.
        (text,), spans = cast(Any, render_jinja_template)(
            [said],
            chat_template=template,
            return_assistant_tokens_mask=bool(_MARKED.search(template)),
            add_generation_prompt=asking,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise SpryError(
            f"The chat template of the tokenizer refuses a conversation of {roles or 'no turn'} ({error}); bring the "
            "turns of data.messages-field into the order that it wants."
        ) from error
    return str(text), spans[0] if spans else []


def _tokens(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [
        any(first < end and start < last for start, end in spans) and first < last
        for first, last in found["offset_mapping"]
    ]
    return list(found["input_ids"]), learned
