"""Questions with several answers: scored by question, which no shard and no held-out part splits."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federation import Federation, tiny_run
from questions import word_tokenizer
from rows import write

from spry_app.config import DataConfig
from spry_app.data import load_corpus, load_shard
from spry_app.errors import SpryError
from spry_app.tasks import TASKS, Encoded

TASK = TASKS["multiple-answers"]
FIELDS: dict[str, str] = {
    "task": "multiple-answers",
    "text_field": "paragraph",
    "text_pair_field": "{question} {answer}",
    "question_field": "idx.question",
    "natural_field": "idx.paragraph",
}
Row = dict[str, Any]


def some_rows(questions: int = 24) -> list[Row]:
    """One to five answers a question, three questions a paragraph; the rows of a question are not neighbours."""
    rows = [
        {
            "idx": {"paragraph": question // 3, "question": question, "answer": 10 * question + answer},
            "paragraph": f"w{20 + question // 3} w{30 + question}",
            "question": f"w5 w{40 + question}",
            "answer": f"w{70 + answer}",
            "label": (question + answer) % 2,
            "tags": ["made up"],
        }
        for question in range(questions)
        for answer in range(1 + question % 5)
    ]
    return rows[::2] + rows[1::2]


def config(folder: Path, rows: list[Row] | None = None, **keys: Any) -> DataConfig:
    source = write(folder / "rows.jsonl", rows or some_rows())
    return DataConfig(**{"source": source, "partition": "iid", "num_labels": 2, **FIELDS, **keys})


def encoded(data: DataConfig) -> Encoded:
    return TASK.encode(load_corpus(data).train, word_tokenizer(), data, True)


def says(*right: bool) -> SimpleNamespace:
    """A model that says of each row whether its answer is right."""
    logits = torch.tensor([[0.0, 1.0] if each else [1.0, 0.0] for each in right])
    return SimpleNamespace(logits=lambda inputs: logits)


def test_the_texts_of_a_row_are_those_of_the_templates(tmp_path: Path) -> None:
    rows = load_corpus(config(tmp_path)).train
    assert rows["text_pair"][0] == "w5 w40 w70" and rows["text"][0] == "w20 w30"
    assert set(rows.column_names) == {"text", "text_pair", "label", "together"}


def test_the_scores_are_multircs(tmp_path: Path) -> None:
    """Three questions with answers (right, wrong), (right, right), (wrong). The model says (right, wrong), (wrong,
    right), (right): it knows all of one question of three; says right three times, right is true three times, both two
    times: F1 = 2 x 2 / (3 + 3); and it is right about three answers of five.
    """
    truth = [(0, 1), (0, 0), (1, 1), (1, 1), (2, 0)]
    rows = [
        {
            "idx": {"paragraph": 0, "question": q, "answer": a},
            "paragraph": "w9",
            "question": "w5",
            "answer": f"w{20 + a}",
            "label": label,
        }
        for a, (q, label) in enumerate(truth)
    ]
    found = encoded(config(tmp_path, rows))
    sums = TASK.judge(says(True, False, False, True, True), found, range(5))
    report = TASK.report(sums)
    assert (sums["said"], sums["right"], sums["both"], sums["questions"], sums["examples"]) == (3, 3, 2, 3, 5)
    assert report == {"f1": pytest.approx(2 / 3), "exact": pytest.approx(1 / 3), "accuracy": pytest.approx(3 / 5)}
    nothing = TASK.judge(says(False), found, [4])
    assert TASK.report(nothing) == {"exact": 1, "accuracy": 1}  # no answer is right, and none is said to be


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_the_answers_to_a_question_are_scored_together(tmp_path: Path, size: int) -> None:
    found = encoded(config(tmp_path))
    parts = list(found.parts(size))
    assert sorted(itertools.chain(*parts)) == list(range(len(found)))
    for one, other in itertools.combinations(parts, 2):
        assert not {found.together[row] for row in one} & {found.together[row] for row in other}
    assert all(len(part) < size + 5 for part in parts)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural"])
def test_no_question_is_split_between_shards_or_held_out_in_part(tmp_path: Path, partition: str) -> None:
    data = config(tmp_path, partition=partition, holdout=0.3)
    parts = [part for index in range(4) for part in vars(load_shard(data, 0, index, 4)).values()]
    seen = [set(part["together"][:]) for part in parts]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 24 and sum(map(len, parts)) == len(some_rows())
    assert all(len(part) for part in parts)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"question_field": "idx.quest"}, r"data\.question-field is 'idx\.quest'.* Did you mean 'idx\.question'\?"),
        ({"text_pair_field": "{question} {anser}"}, r"data\.text-pair-field is .*anser.* Did you mean 'answer'\?"),
        ({"text_field": "{idx.answer}"}, r"data\.text-field 'idx\.answer' .* holds .*int64.*; it must hold text"),
        ({"label_field": "idx.paragraph", "num_labels": 0}, r"whose two classes are wrong and right.* has 8"),
        ({"question_field": "tags"}, r"data\.question-field 'tags' of .* holds List.*; it must hold numbers or text"),
        ({"stride": 3}, r"data\.stride is 3, which data\.task 'multiple-answers' does not use"),
    ],
)
def test_columns_that_will_not_do_are_refused_by_name(tmp_path: Path, keys: Row, message: str) -> None:
    with pytest.raises(SpryError, match=message):
        load_corpus(config(tmp_path, **keys))


def test_a_federation_writes_down_the_scores(tmp_path: Path) -> None:
    write(tmp_path / "answers.jsonl", some_rows())
    keys = {f"data.{name.replace('_', '-')}": value for name, value in FIELDS.items()}
    run = tiny_run(tmp_path) | keys | {"data.source": str(tmp_path / "answers.jsonl"), "data.partition": "natural"}
    federation = Federation(tmp_path, run)
    federation.start(3)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["main-metric"] == "f1" and {"exact", "accuracy"} <= last["metrics"].keys()
    assert last["accuracy"] == last["metrics"]["accuracy"] and last["refused"] == 0
