"""Which data sets the accuracy benchmarks know, what they take others to be, and how rows are set apart for choosing
step sizes. No row of a public one is part of the repository.
"""

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

from spry_app.config import RunConfig, Scalar
from spry_app.data.household import INTENTS, utterances
from spry_app.errors import SpryError

DATA_DIR = os.environ.get("SPRY_DATA", str(Path(__file__).parent.parent.parent / "shared" / "data"))


@dataclass(frozen=True)
class DataSet:
    """text, pair: names of the text fields. labels: classes, 0 as many as the rows have. max_length: tokens kept. test:
    its evaluation file.
    """

    text: str
    labels: int
    max_length: int
    pair: str = ""
    test: str = "validation.jsonl"


HOUSEHOLD = "household"
"""The embedded one, which needs no folder."""
DATA_SETS = {
    HOUSEHOLD: DataSet("text", len(INTENTS), 32, test="test.jsonl"),
    "sst2": DataSet("sentence", 2, 32),
    "ag_news": DataSet("text", 4, 64, test="test.jsonl"),
    "rte": DataSet("premise", 2, 128, "hypothesis"),
    "snli": DataSet("premise", 3, 48, "hypothesis"),
    "mnli": DataSet("premise", 3, 64, "hypothesis"),
    "wic": DataSet("sentence1", 2, 48, "sentence2"),
    "boolq": DataSet("question", 2, 256, "passage"),
    "banking77": DataSet("text", 77, 48, test="test.jsonl"),
}


DATA_HELP = f"of {', '.join(DATA_SETS)}; or a folder of your own in --data-dir, of train.jsonl and test.jsonl"
OWN_TESTS = ("test.jsonl", "validation.jsonl")
"""Evaluation file of a data set that is not in the table, the first that is there."""


def data_set(name: str, data_dir: Path) -> DataSet:
    """The row of the table, else what a folder of somebody's own is taken to be: columns text and label, as `spry run`
    would; --set says otherwise. Raises SpryError where there is no such folder, or not both files in it.
    """
    if name in DATA_SETS:
        return DATA_SETS[name]
    test = next((test for test in OWN_TESTS if (data_dir / name / test).is_file()), "")
    if not test or not (data_dir / name / "train.jsonl").is_file():
        raise SpryError(
            f"--data has {name!r}; it may have {', '.join(DATA_SETS)}, or the name of a folder in --data-dir (now "
            f"{data_dir}) that holds train.jsonl and {' or '.join(OWN_TESTS)}."
        )
    usual = RunConfig.defaults()
    return DataSet(str(usual["data.text-field"]), 0, int(usual["data.max-length"]), test=test)


@dataclass(frozen=True)
class Split:
    """of: what the rows are. Files: train, what clients get; choice, rows of the training file on which step sizes are
    chosen; test, the evaluation file, which nothing but the final accuracies comes from.
    """

    of: DataSet
    train: Path
    choice: Path
    test: Path


def split(name: str, data_dir: Path, folder: Path, train_rows: int, choice_rows: int, seed: int = 0) -> Split:
    """Deal the training file of a data set into two files in `folder`; the evaluation file stays where it is.

    train_rows: at most; 0 for all that are left. Raises SpryError where the data set is not known or not there.
    """
    of = data_set(name, data_dir)
    data_dir = _embedded(folder) if name == HOUSEHOLD else data_dir
    source, test = data_dir / name / "train.jsonl", data_dir / name / of.test
    absent = [str(path) for path in (source, test) if not path.is_file()]
    if absent:
        raise SpryError(
            f"--data {name} needs {' and '.join(absent)}; there is no such file. Say where the data sets are: "
            "--data-dir, or the environment variable SPRY_DATA."
        )
    lines = source.read_text().strip().split("\n")  # a line may hold what Python takes for a break
    random.Random(seed).shuffle(lines)
    if choice_rows >= len(lines):
        raise SpryError(f"--choice-rows is {choice_rows}; {source} has {len(lines)} rows, and some must be trained on.")
    kept = lines[choice_rows:][: train_rows or None]
    folder.mkdir(parents=True, exist_ok=True)
    train, choice = folder / f"{name}-train-{len(kept)}.jsonl", folder / f"{name}-choice-{choice_rows}.jsonl"
    for path, rows in ((train, kept), (choice, lines[:choice_rows])):
        path.write_text("\n".join(rows) + "\n")
    return Split(of, train, choice, test)


def _embedded(folder: Path) -> Path:
    """The folder, with the embedded data set in it as others lie in theirs."""
    (folder / HOUSEHOLD).mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), utterances(), strict=True):
        lines = (json.dumps({"text": row.text, "label": row.label}) for row in rows)
        (folder / HOUSEHOLD / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def with_fewer_tests(rows: Split, folder: Path, name: str, count: int, seed: int = 0) -> Split:
    """So many rows of the evaluation file, in a file of their own in `folder`; all where it has no more."""
    lines = rows.test.read_text().strip().split("\n")
    random.Random(seed).shuffle(lines)
    path = folder / f"{name}-test-{min(count, len(lines))}.jsonl"
    path.write_text("\n".join(lines[:count]) + "\n")
    return replace(rows, test=path)


def data_keys(rows: Split, scored: Path) -> dict[str, Scalar]:
    """Run-config keys of the data set, trained on its rows for it. scored: what the model is scored on."""
    return {
        "data.source": str(rows.train.resolve()),
        "data.test": str(scored.resolve()),
        "data.text-field": rows.of.text,
        "data.text-pair-field": rows.of.pair,
        "data.num-labels": rows.of.labels,
        "data.max-length": rows.of.max_length,
    }


def partition_keys(alpha: str) -> dict[str, Scalar]:
    """alpha: "iid", or the concentration of the Dirichlet partition, whose shards all have as many rows."""
    if alpha == "iid":
        return {"data.partition": "iid"}
    return {"data.partition": "dirichlet", "data.alpha": float(alpha), "data.equal-sizes": True}
