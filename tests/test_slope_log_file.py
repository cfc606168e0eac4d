"""The slope log as a file: read as it was written, refused where it is none, and enough to rebuild the adapter."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, same, tiny_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_slope_log import CLIENTS, away, entry

from spry_app.cli import app
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, Method, get_method
from spry_app.methods.global_state import GlobalState
from spry_app.slope_log import LARGEST, Entry, Measured, SlopeLog, exact_path, pack, read, unpack


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny")) | {"num-server-rounds": 100, "server.evaluate-every": 100}


counts = st.integers(0, 2**40)
real = st.floats(-LARGEST, LARGEST)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    def measured() -> Measured:
        steps, width = draw(st.integers(0, 3)), draw(st.integers(1, 3))
        slopes = tuple(tuple(draw(real) for _ in range(width)) for _ in range(steps))
        return Measured(draw(counts), tuple(draw(st.lists(counts, max_size=3))), draw(counts), slopes)

    return Entry(draw(counts), tuple(measured() for _ in range(draw(st.integers(0, 3)))))


@given(st.lists(entries(), max_size=3))
def test_a_log_is_read_as_it_was_packed(log: list[Entry]) -> None:
    whole, slopes = pack(log)
    assert list(unpack(whole, slopes)) == log
    with pytest.raises(ValueError, match="more slopes"):
        unpack(whole, [*slopes, 1.0])
    if slopes:
        with pytest.raises(ValueError, match="too early"):
            unpack(whole, slopes[:-1])


def test_a_log_whose_last_line_was_cut_short_holds_the_rounds_before(tmp_path: Path) -> None:
    path = tmp_path / "slopes.jsonl"
    log = SlopeLog(path, {"config": {}})
    for round_ in (1, 2):
        log.append(entry(round_, 2), f"digest {round_}", {})
    path.write_text(path.read_text()[:-9])
    header, lines = read(path)
    assert header["config"] == {}
    assert lines == [(entry(1, 2), "digest 1")]


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"format": "spry slopes 0"}\n', "[1]\n"])
def test_what_is_no_log_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "slopes.jsonl").write_text(text)
    with pytest.raises(SpryError, match=r"slopes\.jsonl is not a slope log"):
        read(tmp_path / "slopes.jsonl")


@pytest.mark.parametrize("head_gradient", ["exact", "forward"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.reply == "slopes"])
def test_the_log_alone_rebuilds_the_adapter(
    method: str, head_gradient: str, run_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = {"method": method, "head-gradient": head_gradient, "client.local-steps": 2}
    federation = Federation(tmp_path / "run", run_config | keys)
    federation.start(CLIENTS, rounds=3, tamper=away)
    log = tmp_path / "run" / "slopes.jsonl"
    assert main_status("rebuild", str(log), "--output", str(tmp_path / "adapter")) == 0
    assert "after round 3" in capsys.readouterr().out
    rebuilt = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    federation.adapted.load_tensors(federation.strategy.snapshot())
    federation.adapted.model.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)
    assert same(rebuilt, load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert exact_path(log).exists() == (head_gradient == "exact")


def test_a_log_that_was_changed_rebuilds_nothing(
    run_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    federation = Federation(tmp_path / "run", run_config | {"method": "spry-per-iteration"})
    federation.start(CLIENTS, rounds=2)
    log = tmp_path / "run" / "slopes.jsonl"
    first, second, third = log.read_text().splitlines()
    line = json.loads(second)
    line["slopes"][0] += 1e-3
    log.write_text("\n".join([first, json.dumps(line), third]) + "\n")
    assert main_status("rebuild", str(log), "--output", str(tmp_path / "adapter")) == 2
    assert "is not the one that the server had" in capsys.readouterr().err
    header = json.loads(first)
    log.write_text(json.dumps(header | {"units": header["units"][::-1]}) + "\n")
    assert main_status("rebuild", str(log), "--output", str(tmp_path / "adapter")) == 2
    assert "is of a model with the units ['head'" in capsys.readouterr().err
    log.write_text("\n".join([first, json.dumps(line), third]) + "\n")
    exact_path(log).unlink()
    assert main_status("rebuild", str(log), "--output", str(tmp_path / "adapter")) == 2
    assert "exact.safetensors cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def main_status(*arguments: str) -> int:
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as ended:
        app(list(arguments))
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "measured",
    [
        Measured(0, (7,), 8, ((0.5,),)),
        Measured(0, (0,), 0, ((0.5,),)),
        Measured(0, (0,), 8, ()),
        Measured(0, (0,), 8, ((0.5, 0.5, 0.5),)),
    ],
    ids=["no such unit", "no examples", "no slopes", "an odd slope"],
)
def test_what_another_model_or_method_measured_is_not_followed(measured: Measured) -> None:
    config = RunConfig.from_flower({"method": "decomfl"})
    state = GlobalState({"a": torch.zeros(2)}, {"u": ("a",)}, _two_a_direction(get_method(config)), config)
    with pytest.raises(SpryError, match="Round 1 of the slope log has"):
        state.follow(Entry(1, (measured,)))
    assert not state.tensors["a"].any()


def _two_a_direction(method: Method) -> Method:
    return dataclasses.replace(method, gradient=dataclasses.replace(method.gradient, slopes_per_direction=2))
