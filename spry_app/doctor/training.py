"""Would training be right here? Asked of a tiny random model that goes the way of every other: loaded, quantised,
adapted, tested against differences.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets.utils import logging as datasets_logging
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from spry_app.client.node import load_node
from spry_app.client.trust import check_gradient
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.findings import Finding
from spry_app.methods import get_method

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "the", "was")
QUANTIZATIONS = ("none", "nf4", "fp4", "int8")


def training(quantization: str, device: str, needed: bool) -> Finding:
    """needed: it is what the user wants, so that a failure is a problem and not a note."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="spry-doctor-") as folder, _without_bars():
            node = load_node(config := _config(Path(folder), quantization, device), NODE)
        check_gradient(node, get_method(config).gradient, at_once=2)
    except SpryError as error:
        return Finding("problem" if needed else "note", f"It does not work here: {error}")
    except (RuntimeError, ImportError, OSError, AssertionError) as error:  # a kernel that the wheel has not
        said = str(error).strip().split("\n")[0] or type(error).__name__
        advice = 'set model.quantization="none"' if quantization != "none" else "install a torch for this machine"
        return Finding("problem" if needed else "note", f"It does not run on {device} ({said}): {advice}.")
    seconds = time.monotonic() - started
    return Finding(
        "ok",
        "A tiny model loads, and its slopes agree with differences, one by one and in shared passes.",
        {"seconds": round(seconds, 2), "device": str(node.adapted.device)},
    )


NODE: dict[str, bool | float | int | str] = {"partition-id": 0, "num-partitions": 1}


@contextmanager
def _without_bars() -> Iterator[None]:
    libraries = (transformers_logging, datasets_logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, before in zip(libraries, shown, strict=True):
            if before:
                library.enable_progress_bar()


def _config(folder: Path, quantization: str, device: str) -> RunConfig:
    words = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        BertForSequenceClassification(shape).save_pretrained(folder)
    rows = folder / "rows.jsonl"
    lines = [{"text": f"the film was {word}", "label": index} for index, word in enumerate(("bad", "good"))]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines * 4))
    return RunConfig.from_flower(
        {
            "model.name": str(folder),
            "model.quantization": quantization,
            "model.device": device,
            "data.source": str(rows),
            "data.num-labels": 2,
            "data.partition": "iid",
            "data.holdout": 0.0,
            "data.cache-mib": 0,
        }
    )
