"""Rows for question answering: what is refused, and by which name."""

from pathlib import Path
from typing import Any

import pytest
from questions import some_questions, word_tokenizer
from rows import write

from spry_app.config import DataConfig
from spry_app.data import load_corpus, load_shard
from spry_app.errors import SpryError
from spry_app.tasks import TASKS

TASK = TASKS["question-answering"]
Row = dict[str, Any]


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        ({"question_field": "query"}, {}, r"data\.question-field is 'query', but .* has the columns"),
        ({"context_field": "contxt"}, {}, r"data\.context-field is 'contxt'.* Did you mean 'context'\?"),
        (
            {"answer_field": "answer"},
            {},
            r"data\.answer-field is 'answer', so .* column 'answer\.text'.* Did you mean",
        ),
        ({"text_field": "context"}, {}, r"data\.text-field is 'context', which data\.task .* does not use"),
        ({"max_length": 8, "stride": 4}, {}, r"data\.max-length is 8 and data\.stride is 4.* to 12 at least"),
        ({}, {"question": " "}, r"data\.question-field is empty in row 2 of data\.source"),
        ({}, {"answers": {"text": ["w1"], "answer_start": []}}, r"has 1 texts and 0 first characters in row 2"),
        ({}, {"answers": {"text": ["zz"], "answer_start": [0]}}, r"'zz' at character 0 .* there is 'w\d', in row 2"),
        ({}, {"answers": {"text": ["w2"], "answer_start": [-1]}}, r"'w2' at character -1"),
        ({}, {"answers": {"text": [" "], "answer_start": [2]}}, r"has an answer without text .* in row 2"),
        ({}, {"answers": {"text": [None], "answer_start": [2]}}, r"has a list with a gap in row 2"),
        ({"answer_field": "flat"}, {}, r"'flat\.text' of lists as SQuAD has them, but in .* it holds Value"),
        ({}, {"context": None}, r"data\.context-field 'context' is missing in row 2"),
        ({}, {"question": None}, r"data\.question-field 'question' is missing in row 2"),
        ({"partition": "dirichlet"}, {}, r"data\.partition is 'dirichlet'.* set data\.partition to iid or natural"),
    ],
)
def test_rows_that_will_not_do_are_refused_by_name(tmp_path: Path, keys: Row, change: Row, message: str) -> None:
    rows = [row | {"flat": {"text": "w5", "answer_start": 0}} for row in some_questions(4)]
    rows[1] |= change
    config = {"task": "question-answering", "partition": "iid", "max_length": 24, "stride": 5, **keys}
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SpryError, match=message):
        use(DataConfig(source=source, **config))


def use(config: DataConfig) -> None:
    TASK.encode(load_corpus(config).train, word_tokenizer(), config, True)
    load_shard(config, 0, 0, 2)
