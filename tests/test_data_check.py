"""`spry data`: what is wrong with a file, line by line, and which labels each device would hold."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from typer.testing import CliRunner

from spry_app.cli import app
from spry_app.config import DataConfig
from spry_app.data.check import check_file
from spry_app.data.portrait import dealt

ROWS = [
    {"text": "turn it on", "label": "a"},  # line 1
    {"text": "off", "label": "b"},
    {"text": "turn it on", "label": "b"},  # contradicts line 1
    {"text": " ", "label": "b"},
    {"text": "off", "label": "b"},  # line 2 again
]


def found(path: Path, **changed: Any) -> dict[str, list[tuple[str, str]]]:
    told: dict[str, list[tuple[str, str]]] = {}
    for name, finding in check_file(str(path), DataConfig(source=str(path), **changed)):
        told.setdefault(name, []).append((finding.level, finding.sentence))
    return told


def write_csv(path: Path) -> None:
    pandas.DataFrame(ROWS).to_csv(path, index=False)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": write_csv,
    "rows.parquet": lambda path: pandas.DataFrame(ROWS).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_it_names_the_lines_of_what_is_odd(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    told, first = found(path), 1 if name.endswith(".csv") else 0  # a line with the names of the columns
    noun = "row" if name.endswith(".parquet") else "line"
    assert told == {
        "rows": [("ok", "5 rows.")],
        "text": [("note", f"empty in {noun} {4 + first}.")],
        "labels": [("ok", "2: b 4, a 1.")],
        "length": [("ok", "1 words (median), 3 at most.")],
        "duplicates": [("note", f"said before in {noun} {5 + first}.")],
        "contradictions": [("note", f"said before with another label in {noun} {3 + first}.")],
        "training": [("ok", "5 rows can be trained on as data.task 'classification'.")],
    }


def test_broken_and_missing_lines_are_problems_and_blank_ones_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text":"a","label":0}\n\n{"text":"b"\n{"label":1}\n{"text":"c","label":1}\n[1]\n')
    told = found(path)
    (first, second), (_, rows) = told["rows"][:2], told["rows"][2]
    assert first[0] == second[0] == "problem"
    assert first[1].startswith("line 3 is no row: ")
    assert second[1] == "line 6 is no row: it holds list, not an object."
    assert rows == "3 rows."
    assert told["text"] == [("problem", "missing in line 4.")]
    assert told["training"][0][0] == "problem"


TRAINED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "prompts": ({"task": "causal-lm"}, [{"prompt": f"p{i}", "completion": "yes"} for i in range(3)], "completion"),
    "messages": (
        {"task": "causal-lm"},
        [
            {"id": i, "messages": [{"role": "user", "content": f"p {i}"}, {"role": "assistant", "content": "yes"}]}
            for i in range(3)
        ],
        "messages",
    ),
    "plain text": ({"task": "causal-lm", "text_field": "said"}, [{"said": f"w {i}"} for i in range(3)], "said"),
    "template": (
        {"text_field": "{question} {answer}"},
        [{"question": f"w{i}", "answer": "a", "label": i % 2} for i in range(3)],
        "answer",
    ),
    "nested": (
        {"task": "multiple-answers", "text_pair_field": "{answer}", "question_field": "idx.question"},
        [{"text": "t", "answer": f"w{i}", "idx": {"question": i}, "label": i % 2} for i in range(3)],
        "idx.question",
    ),
    "questions": (
        {"task": "question-answering"},
        [
            {"question": f"q {i}", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}, "title": "t"}
            for i in range(3)
        ],
        "context",
    ),
    "labelled questions": (
        {"task": "question-answering", "label_field": "title", "answer_field": "said"},
        [
            {"question": f"q {i}", "context": "c", "said": {"text": ["c"], "answer_start": [0]}, "title": "t"}
            for i in range(3)
        ],
        "said.text",
    ),
}
"""Name -> settings; rows that they can be trained on with; a column that every row must have."""


@pytest.mark.parametrize("name", TRAINED)
def test_rows_of_every_form_that_trains_have_no_problem_and_a_gap_is_one(name: str, tmp_path: Path) -> None:
    changed, rows, needed = TRAINED[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = found(path, **changed)
    assert told["training"] == [
        ("ok", f"3 rows can be trained on as data.task {changed.get('task', 'classification')!r}.")
    ]
    assert {level for findings in told.values() for level, _ in findings} == {"ok"}

    outer, *inner = needed.split(".")
    gap = {
        **rows[1],
        outer: {key: value for key, value in rows[1][outer].items() if key not in inner} if inner else None,
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], gap, rows[2])))
    told = found(path, **changed)
    assert told[needed] == [("problem", "missing in line 2.")]
    assert told["training"][0][0] == "problem"


def test_a_gap_where_nobody_looks_and_a_label_that_is_left_out_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:2], {"text": "on", "label": None, "who": "me"}]))
    told = found(path, unlabelled="drop")
    assert told["label"] == [("note", "missing in line 3.")] and "who" not in told
    assert told["training"] == [("ok", "2 rows can be trained on as data.task 'classification'.")]
    assert found(path)["label"] == [("problem", "missing in line 3.")]


def test_a_column_that_no_row_has_is_told_once_with_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"sentence":"a b","label":0}\n{"sentence":"c","label":1}\n')
    told = found(path)
    assert [level for findings in told.values() for level, _ in findings].count("problem") == 1
    assert "data.text-field is 'text', but" in told["training"][0][1] and "sentence, label" in told["training"][0][1]
    assert told["length"] == [("ok", "1.5 words (median), 2 at most.")]


def test_the_length_of_a_conversation_is_that_of_its_texts_and_roles(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(TRAINED["messages"][1]))
    assert found(path, task="causal-lm")["length"] == [("ok", "5 words (median), 5 at most.")]


def test_a_line_of_a_table_with_too_many_cells_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",0\na,b,c\nd,1\n')
    assert found(path)["rows"][0] == ("problem", "line 4 is no row: it has 1 cells more than the first line.")


def test_a_label_that_the_run_does_not_know_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    WRITERS["rows.jsonl"](path)
    ((level, sentence),) = found(path, label_names="a,c")["training"]
    assert level == "problem"
    assert "'b' in row 2" in sentence


def test_the_command_exits_with_what_it_found(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    WRITERS["rows.jsonl"](good)
    bad.write_text('{"sentence":"a","label":0}\n')
    run = CliRunner()
    assert run.invoke(app, ["data", "check", str(good)]).exit_code == 0
    done = run.invoke(app, ["data", "check", str(bad), "--json"])
    assert done.exit_code == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["check"] for line in lines if line["level"] == "problem"] == ["training"]
    assert run.invoke(app, ["data", "check", str(bad), "-c", 'data.text-field="sentence"']).exit_code == 1  # one class
    bad.write_text('{"prompt":"a","completion":"b"}\n')
    assert run.invoke(app, ["data", "check", str(bad)]).exit_code == 1
    assert run.invoke(app, ["data", "check", str(bad), "-c", 'data.task="causal-lm"']).exit_code == 0
    assert run.invoke(app, ["data", "check", str(tmp_path / "absent.jsonl")]).exit_code == 2


def test_shards_are_counted_and_drawn(tmp_path: Path) -> None:
    config = DataConfig(partition="dirichlet", alpha=0.3)
    names, rows = dealt(config, seed=0, count=5)
    _, others = dealt(DataConfig(), seed=0, count=3)
    assert [sum(column) for column in zip(*rows, strict=True)] == [sum(column) for column in zip(*others, strict=True)]
    drawn = tmp_path / "shards.png"
    done = CliRunner().invoke(
        app,
        ["data", "shards", "--nodes", "5", "--picture", str(drawn), "-c", 'data.partition="dirichlet" data.alpha=0.3'],
    )
    assert done.exit_code == 0
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    head, *lines = [line.split() for line in done.stdout.splitlines()]
    assert head == ["device", "rows", *names]
    assert [tuple(map(int, line[2:])) for line in lines] == [tuple(row) for row in rows]
    refused = CliRunner().invoke(app, ["data", "shards", "--nodes", "100000"])
    assert refused.exit_code == 2
