"""A whole federation in one process: the real ClientApp on tiny models, every message through Flower's protobuf."""

import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.local_grid import LocalGrid
from spry_app.config import RunConfig
from spry_app.data import label_names
from spry_app.methods import Layout, get_method
from spry_app.models import AdaptedModel, load_model
from spry_app.protocol import to_arrays
from spry_app.server.record import Recorder
from spry_app.server.stopping import end_round
from spry_app.server.strategy import SpryStrategy
from spry_app.tasks import get_task

WORDS = ("good", "great", "fine", "happy", "bad", "awful", "poor", "sad", "film", "plot", "the", "a", "was", "very")

DEPLOYED: dict[str, Any] = {
    "method": "spry-per-iteration",
    "num-server-rounds": 2,
    "data.num-labels": 2,
    "data.natural-field": "user",
    "adapter.rank": 4,
    "client.directions": 4,
    "client.local-steps": 32,
    "client.batch-size": 4,
    "client.optimizer": "adam",
    "client.learning-rate": 0.05,
    "server.optimizer": "average",
}
"""Run config of two short rounds on a real SuperLink, for nodes with rows of `make_rows`."""


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A BERT of 2 layers and 32 hidden numbers with a word tokenizer, saved as a checkpoint."""
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if value.dim() > 1:
            value.data.normal_(0.0, 0.2, generator=generator)
        elif "LayerNorm.weight" not in name:
            value.data.zero_()
    model.save_pretrained(folder)
    return folder


def make_rows(path: Path, rows: int, offset: int = 0) -> Path:
    """Sentences whose label is whether the adjective praises; balanced, and different for each offset."""
    lines = []
    for index in range(offset, offset + rows):
        good = index % 2
        adjective = WORDS[(index // 2) % 4 + (0 if good else 4)]
        text = f"{WORDS[10 + index % 2]} {WORDS[8 + index // 3 % 2]} was {'very ' * (index // 5 % 3)}{adjective}"
        lines.append(json.dumps({"text": text, "label": good, "user": f"u{index % 7}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_sst2(folder: Path, validation: int) -> Path:
    """A checkpoint "tiny", and rows in the form of SST-2, of which those to evaluate on are not among the others."""
    make_checkpoint(folder / "tiny")
    (folder / "sst2").mkdir()
    for name, rows, offset in (("train", 80, 0), ("validation", validation, 7)):
        path = make_rows(folder / "sst2" / f"{name}.jsonl", rows, offset)
        path.write_text(path.read_text().replace('"text"', '"sentence"').replace('"user"', f'"{name}"'))
    return folder


def greedy(partition: int, reply: Message) -> Message:
    """Partition 0 asks for a million times as much."""
    if partition == 0:
        metrics, tensors = reply.content["metrics"], reply.content["arrays"].to_torch_state_dict()
        metrics["slopes"] = [1e6 * slope for slope in metrics["slopes"]]
        reply.content["arrays"] = ArrayRecord({name: 1e6 * value for name, value in tensors.items()})
    return reply


def tiny_run(folder: Path) -> dict[str, Any]:
    """Run config of two short rounds on the checkpoint and the rows above, made in `folder`."""
    return {
        "preset": "",
        "method": "spry",
        "model.name": str(make_checkpoint(folder / "tiny")),
        "data.source": str(make_rows(folder / "rows.jsonl", 96)),
        "data.num-labels": 2,
        "data.partition": "iid",
        "data.holdout": 0.25,
        "client.learning-rate": 0.05,
        "client.batch-size": 8,
        "client.local-steps": 2,
        "client.directions": 2,
        "server.learning-rate": 0.05,
        "num-server-rounds": 2,
        "server.evaluate-every": 2,
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same tensors to the bit, by name."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Federation:
    """A config, its model, its strategy and its record, ready to `start()`."""

    def __init__(self, folder: Path, run_config: dict[str, Any]) -> None:
        self.run_config = run_config
        self.config = RunConfig.from_flower(run_config)
        self.adapted: AdaptedModel = load_model(
            self.config.model,
            self.config.adapter,
            len(label_names(self.config.data)),
            self.config.seed,
            task=get_task(self.config.data),
        )
        self.recorder = Recorder(folder, self.config)
        config = self.config
        self.strategy = SpryStrategy(
            config=config,
            method=get_method(config).on(Layout(self.adapted.depths(), len(self.adapted.blocks)), config.client),
            units=self.adapted.units,
            tensors=self.adapted.tensors(),
            fingerprint=self.adapted.fingerprint,
            recorder=self.recorder,
            score_on_clients=True,
            frame=self.adapted.subspace.sent.tensors if self.adapted.subspace.sent else None,
        )

    def start(self, clients: int, rounds: int | None = None, **grid: Any) -> LocalGrid:
        local = LocalGrid(clients, self.run_config, **grid)
        self.run(local, rounds or self.config.num_server_rounds)
        return local

    def run(self, grid: LocalGrid, rounds: int) -> None:
        self.strategy.start(
            grid,  # type: ignore[arg-type]
            to_arrays(self.strategy.snapshot()),
            num_rounds=rounds,
            evaluate_fn=lambda round_, arrays: end_round(self.config, self.recorder, arrays, None),
        )
