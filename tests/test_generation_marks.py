"""Which tokens of a conversation count where its chat template marks them itself, and where it does not."""

import pytest
from datasets import Dataset
from tiny_causal import CHATML, UNMARKED, byte_tokenizer, encode, learned, turns, whole

from spry_app.errors import SpryError
from spry_app.tasks import IGNORED, Encoded

SAID = [("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes."), ("user", "More"), ("assistant", "No")]
CLIPPED = CHATML.replace("m['content'] + '<|im_end|>' }}{% endgen", "m['content'] }}{% endgen")
"""Whoever wrote this ends a turn otherwise than by the model's own word."""
ASKS = CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>'")
"""It asks for an answer in other words than it writes one: without marks nobody could tell where that begins."""


def marked(template: str, said: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them transformers takes for the assistant's."""
    found = byte_tokenizer(template).apply_chat_template(
        [{"role": role, "content": text} for role, text in said], return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], [mask == 1 for mask in found["assistant_masks"]]


def counts(rows: Encoded, row: int = 0) -> list[bool]:
    return [label != IGNORED for label in rows.targets["labels"][row]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML, "Yes.<|im_end|>No<|im_end|>"),
        (CLIPPED, "Yes.No"),
        (ASKS, "Yes.<|im_end|>No<|im_end|>"),
        (CHATML.replace("{% gen", "{%- gen").replace("generation %}", "generation -%}"), "Yes.<|im_end|>No<|im_end|>"),
    ],
)
def test_what_counts_is_what_a_template_marks(template: str, says: str) -> None:
    rows = encode(turns(*SAID), template=template, max_length=200)
    ids, mask = marked(template, SAID)
    assert rows.features["input_ids"] == [ids] and counts(rows) == mask
    assert learned(rows) == says


def test_without_marks_what_counts_is_what_they_would_mark_in_the_same_words() -> None:
    rows = encode(turns(*SAID), template=UNMARKED, max_length=200)
    ids, mask = marked(CHATML, SAID)
    assert rows.features["input_ids"] == [ids] and counts(rows) == mask


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_an_answer_that_is_part_of_the_prompt_does_not_count_though_it_is_marked(template: str) -> None:
    """As of prompts that are conversations, with one answer to learn at their end."""
    said = [{"role": role, "content": text, "answer": text == "No"} for role, text in SAID]
    rows = encode(Dataset.from_dict({"turns": [said]}), template=template, max_length=200)
    assert learned(rows) == "No<|im_end|>" and len(rows) == 1


def test_a_turn_in_which_nothing_is_marked_is_not_learned_and_a_row_of_such_is_dropped() -> None:
    quiet = CHATML.replace("== 'assistant' %}{% gen", "== 'assistant' and 'Yes' in m['content'] %}{% gen")
    assert learned(encode(turns(*SAID), template=quiet, max_length=200)) == "Yes.<|im_end|>"
    with pytest.raises(SpryError, match="None of 1 rows has a token to learn"):
        encode(turns(("user", "Hi?"), ("assistant", "No")), template=quiet, max_length=200)


def test_each_row_of_a_template_that_writes_earlier_turns_otherwise_learns_what_is_marked_in_its_own_words() -> None:
    """A template that marks thoughts and the last answer alone, and leaves out those of earlier turns."""
    thinking = (
        "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{% generation %}{{ '(thinks)' + m['content'] + '|' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '|' }}{% endif %}{% endfor %}"
    )
    rows = encode(turns(*SAID[1:]), template=thinking)
    assert [whole(rows, row) for row in (0, 1)] == ["u:Hi?|a:(thinks)Yes.|", "u:Hi?|a:Yes.|u:More|a:(thinks)No|"]
    assert [learned(rows, row) for row in (0, 1)] == ["(thinks)Yes.|", "(thinks)No|"]
