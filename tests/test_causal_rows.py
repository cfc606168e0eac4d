"""Rows for causal language modelling: which columns they may have, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset
from tiny_causal import encode, learned

from spry_app.config import DataConfig
from spry_app.data import load_corpus, load_shard
from spry_app.errors import SpryError
from spry_app.tasks import TASKS

TASK = TASKS["causal-lm"]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def corpus(source: str, **keys: Any) -> list[list[tuple[str, str, bool]]]:
    config = DataConfig(task="causal-lm", source=source, **{"partition": "iid", **keys})
    rows = load_corpus(config).train
    return [[(turn["role"], turn["content"], turn["answer"]) for turn in turns] for turns in rows["turns"]]


def test_prompts_and_answers_may_be_texts_names_of_classes_or_messages(tmp_path: Path, own_cache: None) -> None:
    user, own = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
    plain, pair = [("user", "Hi", False), ("assistant", "Yes", True)], {"prompt": "Hi", "completion": "Yes"}
    assert corpus(write(tmp_path / "a.jsonl", pair)) == [plain]
    assert corpus(write(tmp_path / "b.jsonl", {"q": "Hi", "a": "Yes"}), prompt_field="q", answer_field="a") == [plain]
    assert corpus(write(tmp_path / "c.jsonl", {"messages": [user, own], "text": "x"})) == [plain]
    assert corpus(write(tmp_path / "d.jsonl", {"talk": [user, own]}), messages_field="talk") == [plain]
    before = [user, own, user]  # of a conversation that goes on, only the completion is learned
    found = corpus(write(tmp_path / "e.jsonl", {"prompt": before, "completion": [own]}))
    assert found == [[("user", "Hi", False), ("assistant", "Yes", False), *plain]]
    named = Dataset.from_dict({"text": ["Hi"], "label": [1]}).cast_column("label", ClassLabel(names=["No", "Yes"]))
    named.to_parquet(str(tmp_path / "f.parquet"))
    assert corpus(str(tmp_path / "f.parquet"), prompt_field="text", answer_field="label") == [plain]


def test_requests_of_the_embedded_set_can_be_answered_by_their_intent() -> None:
    keys = {"prompt_field": "text", "answer_field": "label", "partition": "natural"}
    (first, *_) = corpus("household", **keys)
    assert [(role, counts) for role, _, counts in first] == [("user", False), ("assistant", True)]
    shard = load_shard(DataConfig(task="causal-lm", **keys), 0, 0, 10).train
    rows = encode(shard.select(range(20)), max_length=200)
    assert learned(rows).endswith("</s>") and rows.dropped == 0


def test_a_dirichlet_partition_deals_out_by_the_label_field(tmp_path: Path, own_cache: None) -> None:
    source = write(tmp_path / "g.jsonl", *({"text": f"t{n}", "kind": f"k{n % 3}"} for n in range(60)))
    keys = {"task": "causal-lm", "source": source, "partition": "dirichlet", "alpha": 100.0}
    assert len(load_shard(DataConfig(**keys, label_field="kind"), 0, 1, 3).train) > 5
    with pytest.raises(SpryError, match=r"data\.partition is 'dirichlet', which deals rows out by their labels"):
        load_shard(DataConfig(**keys), 0, 1, 3)


@pytest.mark.parametrize(
    ("row", "keys", "sentence"),
    [
        ({"txt": "a"}, {}, r"data\.text-field is 'text', but .* has the columns txt\. Did you mean 'txt'"),
        ({"text": 3}, {}, r"data\.text-field 'text' of .* holds .*int64.*; it must hold text"),
        ({"q": "a"}, {"prompt_field": "q", "answer_field": "a"}, r"data\.answer-field is 'a', but .* the columns q"),
        ({"q": "a"}, {"prompt_field": "q"}, r"data\.prompt-field is 'q', data\.answer-field ''.*the first two, or"),
        ({"q": "a"}, {"prompt_field": "q", "answer_field": "q", "messages_field": "q"}, r"or the third alone"),
        ({"prompt": "a", "completion": None}, {}, r"data\.answer-field 'completion'"),
        ({"messages": "hello"}, {}, r"data\.messages-field 'messages' in row 1 of .* is not a list of"),
        ({"messages": [{"role": "user"}]}, {}, r"in row 1 of .* is not a list of .*with texts"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, r"no message of the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, r"begins with the role 'assistant'"),
        ({"text": "a"}, {"label_names": "a,b"}, r"data\.label-names is 'a,b', which data\.task 'causal-lm' does not"),
        ({"text": "a"}, {"num_labels": 2}, r"data\.num-labels is 2, which data\.task 'causal-lm' does not use"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    row: dict[str, Any], keys: dict[str, Any], sentence: str, tmp_path: Path, own_cache: None
) -> None:
    with pytest.raises(SpryError, match=sentence):
        corpus(write(tmp_path / "rows.jsonl", row), **keys)
