"""Which family of models takes which adapter: docs/models.md says it, and every cell of it is what is found here.

A diagonal runs by default, the whole product with every quantisation in `make check`. `PYTHONPATH=. python
tests/test_family_table.py` prints the table.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import SENTENCES, shaken, write_checkpoint
from tiny_models import ALL_MODELS, slopes_by_backprop, some_directions
from torch import Tensor

from spry_app.autodiff.self_check import self_test
from spry_app.autodiff.slopes import Part, forward_mode
from spry_app.config import AdapterConfig, ModelConfig
from spry_app.config.presets import PRESETS
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, NoPrefixError, load_model

EXAMPLES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
    "albert": "ALBERT",
    "deberta": "DeBERTa",
    "deberta-v2": "DeBERTa-v2",
    "deberta-v3": "DeBERTa-v3",
    "opt": "OPT",
    "gpt2": "GPT-2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "phi": "Phi",
    "phi3": "Phi-3",
}
"""Family -> what people call it."""
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"kind": "lora", "rank": 2},
    "core": {key.removeprefix("adapter."): value for key, value in PRESETS["spry-core"].items() if "adapter." in key},
    "DoRA": {"kind": "lora", "rank": 2, "alpha": 4.0, "dora": True},
    "VeRA": {"kind": "vera", "rank": 4},
    "IA3": {"kind": "ia3"},
    "BitFit": {"kind": "bitfit"},
    "LayerNorm": {"kind": "layernorm"},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "P-tuning": {"kind": "p-tuning", "virtual_tokens": 3},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "head": {"kind": "none"},
}
"""Column of the table -> keys of `adapter`."""
QUANTIZATIONS = ("none", "nf4", "int8")

WITHOUT_BIASES = {"llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "phi3"}
READ_THE_LAST_TOKEN = WITHOUT_BIASES | {"opt", "gpt2", "qwen2", "phi"}
SIDEWAYS = {"albert", "deberta", "deberta-v2", "deberta-v3"}
"""Families whose blocks do not simply follow one another."""
REFUSED: list[tuple[set[str], set[str], str, str]] = [
    ({"BitFit"}, WITHOUT_BIASES, "adapter.kind is 'bitfit'.* model has none", "it has no biases"),
    (
        {"IA3"},
        {"distilbert", "albert", "phi3"},
        r"adapter\.targets is empty, and the matrices that IA3 scales",
        "PEFT does not say which matrices IA3 scales: name them by `adapter.targets`, and it works",
    ),
    (
        {"prompt", "P-tuning"},
        READ_THE_LAST_TOKEN,
        "depends on the padding of its batch",
        "its answer is read from the last token, which is padding where a text is given as embeddings; take `prefix`",
    ),
    (
        {"prefix"},
        {"distilbert", *SIDEWAYS},
        r"does not take PEFT's virtual tokens \(.*past key values",
        "it attends to no keys and values but its own; take `prompt`",
    ),
]
"""Columns, families, the error, and what the table says of it."""

CELLS = [(family, column) for family in EXAMPLES for column in KINDS]
PRODUCT = [(*cell, quantization) for cell in CELLS for quantization in QUANTIZATIONS]
DIAGONAL = [
    (family, list(KINDS)[row % len(KINDS)], QUANTIZATIONS[(row + row // len(KINDS)) % 3])
    for row, family in enumerate(EXAMPLES)
]


def _refusal(family: str, column: str) -> int | None:
    """Number of the row of REFUSED."""
    return next(
        (i for i, (columns, families, *_) in enumerate(REFUSED) if column in columns and family in families), None
    )


def _load(folder: str, column: str, quantization: str) -> AdaptedModel:
    model = ModelConfig.model_validate({"name": folder, "device": "cpu", "quantization": quantization})
    return load_model(model, AdapterConfig.model_validate(KINDS[column]), 3, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: write_checkpoint(tmp_path_factory.mktemp(family), family) for family in EXAMPLES}


def check(folder: str, family: str, column: str, quantization: str) -> None:
    """That this cell is as the table says."""
    refused = _refusal(family, column)
    if refused is not None:
        with pytest.raises(SpryError, match=REFUSED[refused][2]):
            _load(folder, column, quantization)
        return
    adapted = _load(folder, column, quantization)
    inputs, labels = dict(adapted.tokenizer(SENTENCES, padding=True, return_tensors="pt")), torch.tensor([0, 2])
    _check_units(adapted, family, column)
    _check_passes(adapted, family, column, inputs)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(adapted.logits(params, inputs), labels)

    self_test(loss, adapted.tensors(), adapted.model)
    trained = shaken(adapted.tensors())
    own = {name: value for name, value in trained.items() if name not in adapted.units["head"]} or trained
    directions = some_directions(own, 3)
    truth = torch.tensor(slopes_by_backprop(loss, own, directions))
    assert truth.norm() > 1e-4
    for at_once in (1, 3):
        slopes = torch.tensor(forward_mode([Part(loss, 1.0)], own, directions, at_once)[1])
        assert (slopes - truth).norm() < 1e-3 * truth.norm()  # float32; test_families has float64


def _check_units(adapted: AdaptedModel, family: str, column: str) -> None:
    """Every trainable tensor is in one unit, the head in the last; two blocks, or one that ALBERT runs twice."""
    names = [name for unit in adapted.units.values() for name in unit]
    assert sorted(names) == sorted(adapted.tensors()) and list(adapted.units)[-1] == "head"
    blocks = 1 if family == "albert" else 2
    assert len(adapted.blocks) == blocks and adapted.depth(adapted.units["head"]) == blocks
    if column in ("LoRA", "DoRA", "VeRA"):
        matrices = 1 if family in ("gpt2", "phi3", "deberta") else 2  # query and value are one
        assert len(adapted.units) == blocks * matrices + 1
    if column in ("prompt", "P-tuning", "prefix"):
        assert list(adapted.units) == ["prompt", "head"]


def _check_passes(adapted: AdaptedModel, family: str, column: str, inputs: dict[str, Tensor]) -> None:
    """Padding is not seen, and a pass that begins higher gives the same, or is refused."""
    whole = adapted.logits({}, inputs)
    alone = adapted.logits({}, dict(adapted.tokenizer(SENTENCES[1:], return_tensors="pt")))
    torch.testing.assert_close(whole[1:], alone, rtol=1e-3, atol=1e-4)
    if family in SIDEWAYS or column in ("prompt", "P-tuning", "prefix"):
        with pytest.raises(NoPrefixError):
            adapted.logits({}, inputs, entering=adapted.prefix(inputs, 1))
    else:
        torch.testing.assert_close(adapted.logits({}, inputs, entering=adapted.prefix(inputs, 1)), whole)


@pytest.mark.parametrize(("family", "column", "quantization"), DIAGONAL)
def test_a_family_takes_an_adapter_as_the_table_says(
    folders: dict[str, str], family: str, column: str, quantization: str
) -> None:
    check(folders[family], family, column, quantization)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "column", "quantization"), sorted(set(PRODUCT) - set(DIAGONAL)))
def test_every_family_takes_every_adapter_as_the_table_says(
    folders: dict[str, str], family: str, column: str, quantization: str
) -> None:
    check(folders[family], family, column, quantization)


def table() -> str:
    """As docs/models.md has it."""
    rows = [["", *KINDS, "passes may begin above the lowest block"], ["---"] * (len(KINDS) + 2)]
    for family, name in EXAMPLES.items():
        found = [_refusal(family, column) for column in KINDS]
        rows.append([name, *("yes" if n is None else f"no ({n + 1})" for n in found)])
        rows[-1].append("no" if family in SIDEWAYS else "yes")
    notes = [f"{number}. {said}." for number, (*_, said) in enumerate(REFUSED, 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + "\n".join(notes) + "\n"


def test_the_table_in_the_docs_is_this_one() -> None:
    written = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert set(EXAMPLES) == set(ALL_MODELS)
    assert table() in written, f"docs/models.md must have this table:\n\n{table()}"


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen2"])
def test_a_tokenizer_without_padding_gets_one_that_the_model_does_not_see(tmp_path: Path, family: str) -> None:
    """As GPT-2's and Llama's are published."""
    adapted = _load(write_checkpoint(tmp_path, family, pad=False), "LoRA", "none")
    assert adapted.model.get_base_model().config.pad_token_id == adapted.tokenizer.pad_token_id is not None
    inputs = dict(adapted.tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    _check_passes(adapted, family, "LoRA", inputs)


if __name__ == "__main__":
    print(table())
