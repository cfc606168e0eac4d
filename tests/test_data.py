"""Rows on their way in: sources, columns, labels, what is refused. The embedded words are in test_household."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from rows import ROWS, Row, local, write

from spry_app.config import DataConfig
from spry_app.data import label_names, load_corpus, load_shard
from spry_app.data.household import INTENTS
from spry_app.errors import SpryError

SHARED = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.usefixtures("own_cache")


# Sources


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_local_file_comes_back_as_it_was_written(tmp_path: Path, ending: str) -> None:
    rows = [{"said": 'a "quoted", word', "kind": 1}, {"said": "NA", "kind": 0}, {"said": "naïve ünïcode", "kind": 2}]
    corpus = load_corpus(local(write(tmp_path / f"rows{ending}", rows), text_field="said", label_field="kind"))
    assert corpus.train["text"][:] == [row["said"] for row in rows]
    assert corpus.train["label"][:] == [1, 0, 2]
    assert corpus.label_names == ("0", "1", "2") and corpus.test is None


def test_a_json_array_is_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:5]))
    assert load_corpus(local(str(tmp_path / "rows.json"))).train["text"][:] == [row["text"] for row in ROWS[:5]]


def test_a_test_file_is_read_with_the_labels_of_the_training_rows(tmp_path: Path) -> None:
    train = [{"text": "x", "label": "yes"}, {"text": "y", "label": "no"}, {"text": "z", "label": "maybe"}]
    corpus = load_corpus(local(write(tmp_path / "a.jsonl", train), test=write(tmp_path / "b.csv", train[:1])))
    assert corpus.label_names == ("maybe", "no", "yes")
    assert corpus.test is not None and corpus.test["label"][:] == [2]


def test_a_folder_is_loaded_the_way_the_hub_is(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:6])
    write(tmp_path / "validation.jsonl", ROWS[6:9])
    corpus = load_corpus(local(str(tmp_path)))
    assert (len(corpus.train), len(corpus.test or ())) == (6, 3)
    assert len(load_corpus(local(str(tmp_path), train_split="train[:3]", test="validation[:1]")).train) == 3


def test_a_test_split_that_hides_its_labels_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:6])
    write(tmp_path / "validation.jsonl", ROWS[6:9])
    write(tmp_path / "test.jsonl", [{**row, "label": -1} for row in ROWS[9:19]])
    assert len(load_corpus(local(str(tmp_path))).test or ()) == 3
    with pytest.raises(SpryError, match=r"-1 in row 1 .* from 0 to 2"):
        load_corpus(local(str(tmp_path), test="test"))


def test_a_source_without_a_labelled_test_split_has_no_test_set_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", ROWS[:6])
    assert load_corpus(local(str(tmp_path))).test is None
    assert "no central test set" in caplog.text


def test_the_embedded_set_brings_its_own_test_set_and_names() -> None:
    corpus = load_corpus(DataConfig())
    assert corpus.label_names == INTENTS == label_names(DataConfig())
    assert corpus.train.column_names == ["text", "label", "group"]
    assert corpus.test is not None and len(corpus.test) == 1000


def test_a_corpus_is_read_once_a_process_and_anew_for_another_config(sentences: str) -> None:
    assert load_corpus(local(sentences)) is load_corpus(local(sentences))
    assert load_corpus(local(sentences, text_field="user")).train["text"][0] == ROWS[0]["user"]


@pytest.mark.parametrize(
    ("name", "evaluation", "keys", "classes"),
    [
        ("sst2", "validation", {"text_field": "sentence"}, 2),
        ("snli", "validation", {"text_field": "premise", "text_pair_field": "hypothesis"}, 3),
        ("ag_news", "test", {}, 4),
    ],
)
def test_public_sets_load(name: str, evaluation: str, keys: Row, classes: int) -> None:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    corpus = load_corpus(local(str(folder / "train.jsonl"), test=str(folder / f"{evaluation}.jsonl"), **keys))
    with (folder / "train.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    assert corpus.train["text"][:] == [row[keys.get("text_field", "text")] for row in rows]
    assert ("text_pair" in corpus.train.column_names) == ("text_pair_field" in keys)
    assert corpus.label_names == tuple(map(str, range(classes)))
    assert len(corpus.test or ()) >= 872


# Labels


def test_label_names_fix_the_order_of_the_classes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "x", "label": "good"}, {"text": "y", "label": "bad"}])
    assert load_corpus(local(source)).train["label"][:] == [1, 0]
    corpus = load_corpus(local(source, label_names="good, so-so, bad"))
    assert corpus.train["label"][:] == [0, 2] and corpus.label_names == ("good", "so-so", "bad")


def test_declared_class_names_are_kept_and_may_be_reordered(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(
        [{"text": "x", "label": 0}, {"text": "y", "label": 1}],
        features=datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["up", "a"])}),
    )
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert load_corpus(local(str(tmp_path / "a.parquet"))).label_names == ("up", "a")
    assert load_corpus(local(str(tmp_path / "a.parquet"), label_names="a,up")).train["label"][:] == [1, 0]


def test_a_number_of_labels_leaves_room_for_classes_that_no_row_has(sentences: str) -> None:
    assert load_corpus(local(sentences, num_labels=5)).label_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("missing", [-1, None])
def test_rows_without_a_label_are_left_out_where_the_config_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: int | None
) -> None:
    rows = [{**row, "label": missing} if number % 5 == 2 else row for number, row in enumerate(ROWS[:20])]
    source = write(tmp_path / "a.jsonl", rows)
    keys: Row = {"partition": "natural", "num_labels": 3, "test": source}
    corpus = load_corpus(local(source, unlabelled="drop", **keys))
    kept = [row for row in rows if row["label"] in (0, 1, 2)]
    assert corpus.train["text"][:] == [row["text"] for row in kept]
    assert corpus.train["group"][:] == [row["user"] for row in kept]
    assert corpus.test is not None and len(corpus.test) == 16
    assert f"data.source '{source}': 4 of 20 rows have no label and are left out" in caplog.text
    with pytest.raises(SpryError, match=rf"is {missing} in row 3 .* data\.unlabelled for rows without"):
        load_corpus(local(source, **keys))
    own = load_shard(local("/nowhere.jsonl", unlabelled="drop", **keys), 0, 0, 1, source)
    assert len(own.train) + len(own.heldout) == 16


def test_a_source_in_which_no_row_has_a_label_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "x", "label": -1}] * 3)
    with pytest.raises(SpryError, match="has no rows"):
        load_corpus(local(source, unlabelled="drop", num_labels=2))


def test_a_text_may_be_put_together_from_several_columns(tmp_path: Path) -> None:
    rows = [{"word": "a {b}", "more": {"said": f"s{label}", "left": 1}, "label": label} for label in (0, 1)]
    source = write(tmp_path / "a.jsonl", rows)
    corpus = load_corpus(local(source, text_field="<{word}>: {more.said}", text_pair_field="more.said"))
    assert corpus.train["text"][:] == ["<a {b}>: s0", "<a {b}>: s1"]
    assert corpus.train["text_pair"][:] == ["s0", "s1"]
    with pytest.raises(SpryError, match=r"data\.text-field is '\{wrd\}'.* Did you mean 'word'\?"):
        load_corpus(local(source, text_field="{wrd}"))
    with pytest.raises(SpryError, match=r"data\.text-field 'more\.left' .* must hold text"):
        load_corpus(local(source, text_field="{word} {more.left}"))


# A node's own file


def test_a_node_uses_all_rows_of_its_own_file_and_no_others(tmp_path: Path) -> None:
    config = DataConfig(source="/nowhere/to/be/found.jsonl", num_labels=3, holdout=0.2)
    own = write(tmp_path / "own.csv", ROWS[:10])
    shard = load_shard(config, seed=0, index=-1, count=0, file=own)
    assert sorted(shard.train["text"][:] + shard.heldout["text"][:]) == sorted(row["text"] for row in ROWS[:10])
    assert len(shard.heldout) == 2


def test_names_in_a_nodes_file_get_the_ids_that_all_nodes_share(tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", [{"text": "x", "label": "sad"}] * 3)
    shard = load_shard(DataConfig(label_names="happy,angry,sad"), 0, 0, 1, own)
    assert shard.train["label"][:] == [2, 2]
    with pytest.raises(SpryError, match=r"'sad' in row 1 of node-config key \"data\""):
        load_shard(DataConfig(), 0, 0, 1, own)


def test_a_nodes_file_without_a_shared_order_of_classes_is_refused(tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", ROWS[:4])
    with pytest.raises(SpryError, match=r"set data\.label-names, or data\.num-labels"):
        load_shard(DataConfig(source="/nowhere/to/be/found.jsonl"), 0, 0, 1, own)


# Bad input


def bad(message: str, rows: list[Row] | None = None, **keys: Any) -> Any:
    return pytest.param(rows or ROWS[:6], keys, message, id=message[:40])


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        bad(r"data\.text-field is 'txt'.* columns text, label, user\. Did you mean 'text'\?", text_field="txt"),
        bad(r"data\.text-pair-field is 'users'.* Did you mean 'user'\?", text_pair_field="users"),
        bad(r"data\.label-field is 'labels'.* Did you mean 'label'\?", label_field="labels"),
        bad(r"data\.text-field 'label' .* must hold text", text_field="label"),
        bad(r"'text' is missing in row 2", [{"text": "a", "label": 0}, {"text": None, "label": 1}]),
        bad(r"'label' is None in row 2", [{"text": "a", "label": 0}, {"text": "b", "label": None}, *ROWS]),
        bad(r"'label' is 2 in row 3 .* from 0 to 1", num_labels=2),
        bad(r"'label' is -1 in row 1", [{"text": "a", "label": -1}, *ROWS[:6]]),
        bad(r"holds float", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]),
        bad(r"at least two are needed", [{"text": "a", "label": 0}]),
        bad(r"is data\.label-field 'label' a label\?", [{"text": "a", "label": 123456}, *ROWS[:6]]),
        bad(r"6 kinds of label .* data\.num-labels is 3", label_field="text", num_labels=3),
        bad(r"'sentence 0' in row 1 .* one of x, y", label_field="text", label_names="x,y"),
        bad(r"data\.num-labels must be their number", label_names="x,y", num_labels=3),
        bad(r"give one class; at least two", num_labels=1),
        bad(r"the names must differ", label_names="x,x"),
        bad(r"data\.test is 'validation'.* leave it empty", test="validation"),
        bad(r"data\.test is '/no/such\.csv', but there is no file", test="/no/such.csv"),
    ],
)
def test_bad_columns_and_labels_are_refused_by_name(tmp_path: Path, rows: list[Row], keys: Row, message: str) -> None:
    with pytest.raises(SpryError, match=message):
        load_corpus(local(write(tmp_path / "rows.jsonl", rows), **keys))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "there is no file .* absolute path"),
        ("empty.jsonl", "", "is empty; it needs at least one row"),
        ("blank.jsonl", "\n\n", "cannot be read as .jsonl: it has no rows"),
        ("header.csv", "text,label\n", "has no rows"),
        ("broken.jsonl", '{"text": "a", "label": 1}\nnot json\n', "cannot be read as .jsonl: JSON parse error"),
        ("broken.parquet", "xx", "cannot be read as .parquet"),
        ("mixed.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "c"}\n', "holds int, str"),
        ("no-such-set", None, r"looked up on the Hub; check data\.source"),
    ],
)
def test_an_unreadable_source_is_refused_by_name(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SpryError, match=f"data\\.source.*{message}"):
        load_corpus(local(str(tmp_path / name)))


def test_a_test_file_without_rows_is_refused(sentences: str, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,label\n")
    with pytest.raises(SpryError, match=r"the test set \(data\.test .* has no rows"):
        load_corpus(local(sentences, test=str(tmp_path / "test.csv")))


def test_a_nodes_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(SpryError, match=r"node-config key \"data\" is .*must end in \.jsonl"):
        load_shard(DataConfig(num_labels=2), 0, 0, 1, str(tmp_path / "rows.txt"))


@pytest.mark.parametrize(
    ("keys", "index", "count", "message"),
    [
        ({}, 3, 3, "partition-id 3 of num-partitions 3"),
        ({}, -1, 3, "partition-id -1"),
        ({}, 0, 121, "121 nodes cannot share the 120 rows"),
        ({"partition": "dirichlet", "alpha": 0.01}, 0, 100, r"data\.alpha 0\.01 leaves some of 100 shards empty"),
        ({"partition": "natural"}, 0, 50, r"data\.natural-field is 'user'.* different values for 50 nodes"),
        ({"partition": "natural", "natural_field": "usr"}, 0, 2, r"Did you mean 'user'\? Or set data\.partition"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(sentences: str, keys: Row, index: int, count: int, message: str) -> None:
    with pytest.raises(SpryError, match=message):
        load_shard(local(sentences, **keys), 0, index, count)


def test_a_group_that_is_missing_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*ROWS[:3], {**ROWS[3], "user": None}])
    with pytest.raises(SpryError, match=r"1 rows where it is missing, the first is row 4"):
        load_shard(local(source, partition="natural"), 0, 0, 2)
