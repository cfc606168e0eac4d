"""Weights that do not fit: told before they are loaded, with what would."""

from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_checkpoint
from torch import nn

from spry_app.config import AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import load_model, room

FORMATS = [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16"), ("fp4", "float32"), ("int8", "float32")]


def _load(folder: str, quantization: str, dtype: str) -> Any:
    config = {"name": folder, "device": "cpu", "quantization": quantization, "dtype": dtype}
    return load_model(ModelConfig.model_validate(config), AdapterConfig(kind="none"), 3, 0)


def _bytes(model: nn.Module) -> int:
    """Of the frozen weights as they lie in memory, scales included; the head is there once."""
    found = 0
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            continue
        found += parameter.data.nbytes
        state = getattr(parameter, "quant_state", None)
        found += state.absmax.nbytes if state is not None else 0
        scales = getattr(parameter, "SCB", None)
        found += scales.nbytes if scales is not None else 0
    return found


@pytest.mark.parametrize(("quantization", "dtype"), FORMATS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "albert"])
def test_what_weights_take_is_told_from_their_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, quantization: str, dtype: str
) -> None:
    """To 7 %: int8 has a scale for each row, which is one for 16 weights here and nothing in a model of real width."""
    told: list[int] = []
    monkeypatch.setattr(room, "free_bytes", lambda device: told.append(1) or 1 << 40)
    count = room.weight_bytes
    monkeypatch.setattr(room, "weight_bytes", lambda *a: told.append(count(*a)) or told[-1])
    adapted = _load(write_checkpoint(tmp_path, family), quantization, dtype)
    assert told[-1] == pytest.approx(_bytes(adapted.model.get_base_model()), rel=0.07)


def test_a_model_that_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path)
    seen: list[int] = []
    count = room.weight_bytes
    monkeypatch.setattr(room, "weight_bytes", lambda *a: seen.append(count(*a)) or seen[-1])
    _load(folder, "none", "float32")
    monkeypatch.setattr(room, "free_bytes", lambda device: seen[0] * 3 // 4)
    with pytest.raises(SpryError) as refused:
        _load(folder, "none", "float32")
    said = str(refused.value)
    assert said.startswith(f"model.name is {folder!r}, whose weights take ") and 'model.dtype="float32"' in said
    assert 'What fits: model.quantization="none" with model.dtype="bfloat16"' in said and "nf4" in said
    _load(folder, "none", "bfloat16")
    monkeypatch.setattr(room, "free_bytes", lambda device: 100)
    with pytest.raises(SpryError, match=r"Nothing fits: nf4 takes 0\.0\d MiB"):
        _load(folder, "none", "float32")


def test_files_that_a_container_keeps_in_memory_count_as_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nactive_file 400\ninactive_file 200\n")
    assert room._free_in_container(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert room._free_in_container(tmp_path) > 1 << 60
