"""Rows and tokens on disk: to the bit what they are in memory, found again, and never what they are not."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from federation import Federation, make_rows, same, tiny_run
from questions import some_questions, word_tokenizer
from rows import ROWS, local, write
from test_multiple_answers import some_rows
from tiny_causal import byte_tokenizer, instructions
from transformers import PreTrainedTokenizerFast

from spry_app import stored as store
from spry_app.config import DataConfig
from spry_app.data import load_corpus, load_shard
from spry_app.data.sources import read_file
from spry_app.tasks import TASKS, Encoded, encode_rows, get_task
from spry_app.tasks.conversation import give_template

ROOT = Path(__file__).parent.parent
SQUAD = {"task": "question-answering", "max_length": 24, "stride": 5}


@pytest.fixture
def large(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All rows are for the disk, a few at a time."""
    monkeypatch.setattr(store, "LARGE_BYTES", 0)
    monkeypatch.setattr(store, "ROWS_AT_ONCE", 7)
    return cache


def squad(path: Path) -> str:
    return write(path, [row | {"title": f"t{number % 4}"} for number, row in enumerate(some_questions(40))])


def answers(path: Path) -> str:
    return write(path, some_rows())


def texts(path: Path) -> str:
    return write(path, [row | {"more": f"a{n % 5} {'b ' * (n % 40)}"} for n, row in enumerate(ROWS)])


def chats(path: Path) -> str:
    return instructions(path, 60)


MULTIPLE = {
    "task": "multiple-answers",
    "text_field": "paragraph",
    "text_pair_field": "{question} {answer}",
    "question_field": "idx.question",
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "texts": (texts, {"max_length": 5, "partition": "iid"}),
    "pairs": (texts, {"text_pair_field": "more", "max_length": 20, "partition": "natural", "natural_field": "user"}),
    "templates": (texts, {"text_field": "{user}: {text}", "text_pair_field": "{more}!", "partition": "iid"}),
    "names": (texts, {"label_field": "user", "num_labels": 0, "partition": "iid"}),
    "plain": (texts, {"task": "causal-lm", "text_field": "more", "max_length": 8, "partition": "iid"}),
    "chats": (chats, {"task": "causal-lm", "prompt_field": "text", "answer_field": "kind", "partition": "iid"}),
    "packed": (
        chats,
        {"task": "causal-lm", "packing": True, "max_length": 100, "partition": "dirichlet", "label_field": "kind"},
    ),
    "windows": (squad, {**SQUAD, "partition": "dirichlet", "label_field": "title"}),
    "answers": (answers, {**MULTIPLE, "num_labels": 2, "partition": "iid"}),
}


def tokenizer_of(config: DataConfig) -> PreTrainedTokenizerFast:
    if config.task != "causal-lm":
        return word_tokenizer()
    found = byte_tokenizer()
    give_template(found)
    return found


def encoded(config: DataConfig, index: int = 0, tokenizer: PreTrainedTokenizerFast | None = None) -> list[Encoded]:
    """Rows to train on and rows held back, of a node's shard."""
    task, parts = get_task(config), load_shard(config, 0, index, 2)
    found = tokenizer or tokenizer_of(config)
    return [encode_rows(task, rows, found, config, rows is parts.train) for rows in (parts.train, parts.heldout)]


def everything(rows: Encoded) -> dict[str, Any]:
    """What a node can know of its rows, in an order of batches that is not that of the rows."""
    whole = range(len(rows))
    batches = [rows.batch(list(whole)[start::5]) for start in range(5) if list(whole)[start::5]]
    return {
        "batches": [{name: (value.dtype, value.tolist()) for name, value in batch.items()} for batch in batches],
        "lost": (rows.cut, rows.dropped, rows.padding_side),
        "weights": [rows.weight([row]) for row in whole],
        "parts": list(rows.parts(4)),
        "together": list(rows.together),
        "kept": [{name: getattr(kept, name) for name in kept._fields if name != "offsets"} for kept in rows.kept],
        "offsets": [(kept.offsets.dtype, kept.offsets.tolist()) for kept in rows.kept],
    }


@pytest.mark.parametrize("case", CASES)
def test_every_task_has_the_same_batches_from_disk_as_from_memory(
    case: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, keys = CASES[case]
    config = DataConfig(**{"source": make(tmp_path / "rows.jsonl"), "holdout": 0.3, **keys})
    in_memory = [everything(rows) for rows in encoded(config)]
    assert not list(cache.glob("tokens-*"))
    again = config.model_copy(update={"cache_mib": 100})  # nothing that this process has loaded
    monkeypatch.setattr(store, "LARGE_BYTES", 0)
    monkeypatch.setattr(store, "ROWS_AT_ONCE", 7)
    for _ in range(2):  # made, then read
        assert [everything(rows) for rows in encoded(again)] == in_memory
    assert len(list(cache.glob("tokens-*.lock"))) == 2 and len(list(cache.glob("columns-*.lock"))) == 1


def test_a_federation_learns_the_same_bits_from_disk(tmp_path: Path, large: Path) -> None:
    run = tiny_run(tmp_path)
    from_disk = Federation(tmp_path / "disk", run)
    from_disk.start(clients=2)
    assert len(list(large.glob("tokens-*.lock"))) == 4
    store.LARGE_BYTES = 1 << 40  # monkeypatch puts it back
    in_memory = Federation(tmp_path / "memory", run | {"data.cache-mib": 100})
    in_memory.start(clients=2)
    assert same(from_disk.strategy.snapshot(), in_memory.strategy.snapshot())


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_large_file_is_read_as_a_small_one(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"a": "NA" if n % 3 else "x", "b": n, "c": n / 2, "d": n if n % 2 else None, "e": None if n < 9 else n > 20}
        for n in range(30)
    ]
    path = write(tmp_path / f"rows{ending}", [row | {"f": f"w{row['b']}" if row["b"] > 25 else "7"} for row in rows])
    monkeypatch.setattr(store, "LARGE_BYTES", 1 << 40)
    small = read_file(path, "here", 100)
    monkeypatch.setattr(store, "LARGE_BYTES", 0)
    monkeypatch.setattr("spry_app.data.sources._CELLS", 4)
    found = read_file(path, "here", 100)
    assert found[:] == small[:] and found.features == small.features


def test_the_names_of_classes_come_with_a_large_file(tmp_path: Path, large: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["up", "a"])})
    rows = datasets.Dataset.from_list([{"text": "x", "label": n % 2} for n in range(30)], features=features)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    config = DataConfig(source="unused", label_names="a,up", holdout=0.0)
    assert load_shard(config, 0, -1, 0, str(tmp_path / "a.parquet")).train["label"][:].count(1) == 15
    found = load_corpus(local(str(tmp_path / "a.parquet")))
    assert found.label_names == ("up", "a") and found.train["label"][:] == [0, 1] * 15


# What an entry is known by


def made(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What became of each set of rows since the last call."""
    said = [record.message.rpartition(": ")[2] for record in caplog.records if "Tokens of" in record.message]
    caplog.clear()
    return said


def test_a_second_start_reads_tokens_and_whatever_changes_makes_others(
    tmp_path: Path, large: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "spry_app.tasks.on_disk")
    path = tmp_path / "rows.jsonl"
    config = DataConfig(source="unused", num_labels=3, partition="iid")

    def start(tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0, **keys: Any) -> list[str]:
        mine = config.model_copy(update=keys)
        rows = load_shard(mine, seed, -1, 0, str(path)).train
        encode_rows(TASKS["classification"], rows, tokenizer or word_tokenizer(), mine, True)
        return made(caplog)

    before = os.stat(write(path, ROWS))
    assert start() == ["made."] and start() == ["read from the cache."]
    used = word_tokenizer()
    used("w5 w6", truncation=True, max_length=3, padding="max_length")  # what a call leaves in a tokenizer
    assert start(used) == ["read from the cache."]
    assert start(max_length=5) == ["made."]
    assert start(seed=1) == ["made."]
    assert start(word_tokenizer("[CLS] $A [SEP] [SEP] $B [SEP]")) == ["made."]
    other = word_tokenizer()
    other.add_tokens(["sentence"])
    assert start(other) == ["made."] and start(other) == ["read from the cache."]
    write(path, [{**row, "text": row["text"].replace("sentence", "SENTENCE")} for row in ROWS])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    assert start() == ["made."]
    monkeypatch.setattr("spry_app.tasks.on_disk._LIBRARIES", ("numpy",))
    assert start() == ["made."]
    assert start(cache_mib=0) == ["made."] and start() == ["read from the cache."]


def test_nobody_else_may_look_into_the_cache_and_nothing_of_it_is_in_the_project(tmp_path: Path, large: Path) -> None:
    large.mkdir(mode=0o755, parents=True)
    encoded(DataConfig(source=texts(tmp_path / "rows.csv"), num_labels=3, partition="iid"))
    assert stat.S_IMODE(large.stat().st_mode) == 0o700 and list(large.glob("tokens-*"))
    assert store.cache_folder() == large and ROOT not in large.parents


# Memory

_WITHIN = """
import os, resource, sys
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
from datasets import disable_progress_bars
from spry_app import stored
from spry_app.config import DataConfig
from spry_app.data import batches, load_shard
from spry_app.tasks import TASKS, encode_rows
from federation import WORDS
from questions import word_tokenizer
disable_progress_bars()
stored.LARGE_BYTES = int(sys.argv[3])
tokenizer = word_tokenizer()
tokenizer(["w5 w6"] * 2)
config = DataConfig(source="unused", num_labels=2, max_length=32)
encode_rows(TASKS["classification"], load_shard(config, 0, -1, 0, sys.argv[1]).train, tokenizer, config, True)
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now * 1024 + int(sys.argv[4]),) * 2)
rows = encode_rows(TASKS["classification"], load_shard(config, 0, -1, 0, sys.argv[2]).train, tokenizer, config, True)
for part in batches(len(rows), 8, (0,)):
    rows.batch(part)
print(len(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is allocated, and not files, on Linux")
def test_rows_of_which_the_tokens_do_not_fit_into_memory_are_trained_on(tmp_path: Path, cache: Path) -> None:
    """24 MiB of rows in 256 MiB; in memory their tokens do not fit."""
    few, many = make_rows(tmp_path / "few.jsonl", 100), tmp_path / "many.jsonl"
    with many.open("w") as file:
        for number in range(100_000):
            words = " ".join(f"w{5 + number * step % 90}" for step in range(50 + number % 10))
            file.write(json.dumps({"text": words, "label": number % 2}) + "\n")
    assert many.stat().st_size > 20 << 20

    def run(large: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", _WITHIN, str(few), str(many), str(large), str(256 << 20)]
        environment = os.environ | {"PYTHONPATH": "tests", "RAYON_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    done = run(store.LARGE_BYTES)
    assert done.stdout.split() == ["90000"], done.stderr
    assert run(1 << 40).returncode != 0
