"""`spry plan`: a task on tensors without data takes what the real one takes, and its advice follows from its rows."""

import dataclasses
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_family_table import EXAMPLES
from tiny_checkpoints import write_checkpoint
from tiny_models import ALL_MODELS, MODELS
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from spry_app.autodiff.budget import SMALLEST, Slices
from spry_app.autodiff.directions import Seed
from spry_app.autodiff.memory import peak_mib, return_freed_memory
from spry_app.cli import app
from spry_app.client.step import Step
from spry_app.client.training import train
from spry_app.config import RunConfig
from spry_app.launcher.settings import run_config_of
from spry_app.methods import get_method
from spry_app.methods.replay import exact_names
from spry_app.models import load_model
from spry_app.models.skeleton import weights_bytes
from spry_app.planner.advice import advise
from spry_app.planner.blank import model_of, node_of
from spry_app.planner.plan import Asked, _furthest, plan
from spry_app.planner.predict import Predictor
from spry_app.planner.rows import Row
from spry_app.planner.ways import Way, ways
from spry_app.protocol import Task
from spry_app.server.memory import MARGIN, step_memory
from spry_app.tasks import get_task

LENGTH, BATCH = 48, 8
WIDER = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
GRADIENTS = ("backprop", "checkpointed backprop", "forward mode", "central difference")
"""Names of rows; the others differ from these in the number of passes alone, or in that of directions."""
TOGETHER, BISECTED = "forward mode, K at once", "bisected backprop"
FAMILIES = [family for family in ALL_MODELS if family in EXAMPLES]
WHOLE = ("albert", "deberta", "deberta-v2", "deberta-v3")  # whose blocks cannot be passed one by one


def config(folder: str, **keys: Any) -> RunConfig:
    flat = {
        "model.name": folder,
        "data.max-length": LENGTH,
        "client.batch-size": BATCH,
        "client.micro-batch": 4,
        "client.directions": 2,
        "client.directions-at-once": 2,
        "data.num-labels": 3,
    }
    return RunConfig.from_flower(RunConfig.defaults() | flat | keys)


def wide(folder: Path, family: str) -> str:
    """The tiny family's configuration, as wide as tensors have to be to outweigh the rest."""
    name = write_checkpoint(folder, family)
    settings = AutoConfig.from_pretrained(name)
    for key, value in WIDER.items():
        if hasattr(settings, key):
            setattr(settings, key, value)
    for key, value in {
        "head_dim": 16,
        "ffn_dim": 256,
        "word_embed_proj_dim": 64,
        "hidden_dim": 256,
        "pooler_hidden_size": 64,
    }.items():
        if getattr(settings, key, None) is not None:
            setattr(settings, key, value)
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(name)
    return name


def measured(way: Way, slices: Slices) -> float:
    """Of the same task on a model with weights, from the profiler's record of what the CPU's allocator did."""
    task = get_task(way.config.data)
    adapted = load_model(way.config.model, way.config.adapter, 3, 0, task=task)
    node = node_of(adapted, task, BATCH, LENGTH)
    client = way.config.client.model_copy(update={"local_steps": 1})
    run = way.config.model_copy(update={"client": client})
    directions = way.config.client.directions
    asked = Task(1, 0, node.start, way.units, "", directions=directions)
    train(node, asked, way.method, run, slices)  # what is tried once a process
    return peak_mib(lambda: train(node, asked, way.method, run, slices), "cpu")


def compare(folder: Path, family: str, names: tuple[str, ...], **keys: Any) -> None:
    settings = config(wide(folder, family), **keys)
    predictor = Predictor(model_of(settings), host=True)
    found = {way.name: way for way in ways(settings, predictor.adapted, 2) if way.hand == "all"}
    for name in names:
        slices = Slices(4, found[name].config.client.directions_at_once)
        predicted = predictor.peaks(found[name], slices)[0]
        real = measured(found[name], slices)
        print(f"{family}, {name}: predicted {predicted:.3f}, measured {real:.3f} MiB")
        assert 0.9 * real - 0.02 <= predicted <= 1.1 * real + 0.02, (family, name)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in MODELS])
def test_the_lightest_steps_are_predicted_to_a_tenth(tmp_path: Path, family: str) -> None:
    compare(tmp_path, family, ("forward mode", BISECTED))


def test_a_model_that_cannot_be_passed_block_by_block_has_a_row_that_says_so(tmp_path: Path) -> None:
    settings = config(wide(tmp_path, "albert"))
    found = plan(settings, Asked(memory_mib=64.0, forward_ms=1.0, nodes=2, hands=("all",), limits=False))
    told = {row.gradient: row.error for row in found.rows if row.hand == "all"}
    assert told["bisected backprop"] == "block 0 ran where block 1 was due"
    assert not any(error for name, error in told.items() if name != BISECTED)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_predicted_to_a_tenth(tmp_path: Path, family: str) -> None:
    compare(tmp_path, family, (*GRADIENTS, TOGETHER, *(() if family in WHOLE else (BISECTED,))))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_step_on_quantised_weights_is_predicted_to_a_tenth(tmp_path: Path, quantization: str) -> None:
    compare(tmp_path, "llama", ("backprop", "forward mode"), **{"model.quantization": quantization})


def test_the_smallest_steps_by_which_units_are_dealt_out_are_predicted_to_a_tenth_and_never_short(
    tmp_path: Path,
) -> None:
    """A client's own step of one example, in the smallest slices, on the units from each block up. A tenth is added, so
    that a node which has as much does not refuse it.
    """
    settings = config(wide(tmp_path, "bert"), method="spry")
    task, method = get_task(settings.data), get_method(settings)
    adapted = load_model(settings.model, settings.adapter, 3, 0, task=task)
    node, depths = node_of(adapted, task, BATCH, LENGTH), adapted.depths()
    predicted = step_memory(adapted, node.train, settings, method)
    for kind in ("backprop", "checkpointed-backprop", "bisected-backprop", "forward-mode", "central-difference"):
        own = method.taking(kind)
        for lowest in (0, 1, 2):
            tensors = {name: value for name, value in adapted.tensors().items() if depths[name] >= lowest}
            exact = exact_names(adapted.units, own, settings.head_gradient) & tensors.keys()
            step = functools.partial(Step(node, own.gradient, exact, 1, SMALLEST).estimate, [1], tensors)
            step(Seed(0, 0, 0, 0))  # what is tried once a process
            real = peak_mib(functools.partial(step, Seed(0, 0, 0, 0)), "cpu")
            assert predicted(kind, lowest) / MARGIN == pytest.approx(real, rel=0.1, abs=0.005), (kind, lowest)
            assert predicted(kind, lowest) >= real, (kind, lowest)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_weights_without_data_take_what_the_real_ones_do(tmp_path: Path, family: str, quantization: str) -> None:
    settings = config(wide(tmp_path, family), **{"model.quantization": quantization})
    real = load_model(settings.model, settings.adapter, 3, 0, task=get_task(settings.data))
    assert weights_bytes(model_of(settings).model) == pytest.approx(weights_bytes(real.model), rel=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "bert")


def spry(*arguments: str, folder: str) -> Any:
    keys = f'model.name="{folder}" data.num-labels=3 data.max-length=8 client.directions=2 client.batch-size=2'
    limited = ["plan", "--forward-ms", "2", "--units", "all", "-c", keys, *arguments]
    return CliRunner().invoke(app, limited)


def test_no_weights_are_needed_and_the_advice_is_a_run(folder: str) -> None:
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()
    told = spry("--json", "-c", 'assign="every-unit"', folder=folder)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    rows = {row["gradient"]: row for row in found["rows"]}
    assert all(row["fits"] and not row["error"] for row in rows.values())
    best = found["rows"][found["advice"]["row"]]
    assert best["gradient"] == "backprop" and "exact" in found["advice"]["reason"]
    RunConfig.from_flower(RunConfig.defaults() | {"model.name": folder} | best["keys"])
    parts = ("weights", "activations", "tangents_or_graph", "optimizer", "workspace")
    for row in rows.values():
        assert row["total_mib"] == pytest.approx(sum(row[f"{part}_mib"] for part in parts))
    # With an exact head from the same passes, 2 directions one by one are 2 (1 + 1) passes of each of 2 examples.
    assert rows["forward mode"]["forwards"] == pytest.approx(8) and rows["backprop"]["forwards"] == pytest.approx(4)
    assert rows["forward mode"]["step_s"] == pytest.approx(8 * 0.002)
    assert rows["forward mode"]["up_bytes"] < rows["backprop"]["up_bytes"]


def test_the_command_at_the_end_has_what_was_asked_for_too(folder: str) -> None:
    """Of two settings of one key the later one wins: the plan's, as in the run it is of. The adapter is the plan's."""
    told = spry("--no-limits", "-c", 'assign="every-unit"', folder=folder)
    words = shlex.split(told.stdout.splitlines()[-1])
    assert words[:2] == ["spry", "run"] and words[2::2] == ["-c"] * 3
    known = {"model.name": folder, "client.directions": 2, "gradient": "backprop", "adapter.subspace": "core"}
    assert known.items() <= run_config_of({}, words[3::2]).flat().items()


def test_where_nothing_fits_the_status_says_so_and_a_sentence_what_would(folder: str) -> None:
    told = spry("--memory-gib", "0.00001", "--no-limits", folder=folder)
    assert told.exit_code == 1
    assert "Nothing fits into 0 MiB. The least is" in told.stdout


def test_a_model_that_is_not_there_is_an_error(folder: str) -> None:
    told = spry("-c", 'model.name="/no/such/folder"', folder=folder)
    assert told.exit_code == 2
    assert spry("--units", "some", folder=folder).exit_code == 2


def row(gradient: str, **values: Any) -> Row:
    return Row(gradient=gradient, hand="all", **{"fits": True, "total_mib": 10.0} | values)


def test_an_exact_gradient_is_worth_as_many_passes_as_slopes_need_for_its_progress() -> None:
    """K = 8 along 799 numbers: 1 / c^2 = 1 + 800 / 8 = 101; 10 such passes make as much of a step as 1010."""
    slopes = row("forward mode", forwards=10.0, directions=8, perturbed=799)
    exact = row("backprop", forwards=1000.0)
    assert advise([slopes, exact], 100.0).row == 1
    assert advise([slopes, dataclasses.replace(exact, forwards=1020.0)], 100.0).row == 0
    together = dataclasses.replace(slopes, holders=10)  # 80 directions for 799 numbers: 11 times, not 101
    assert advise([together, dataclasses.replace(exact, forwards=120.0)], 100.0).row == 0
    assert advise([together, dataclasses.replace(exact, forwards=100.0)], 100.0).row == 1
    alone = advise([slopes, dataclasses.replace(exact, fits=False, total_mib=200.0)], 100.0)
    assert alone.row == 0 and "no backpropagation fits (the least takes 200 MiB)" in alone.reason
    assert advise([dataclasses.replace(slopes, fits=False)], 1.0).row is None


def test_the_furthest_that_fits_is_found_in_few_trials() -> None:
    trials: list[int] = []

    def peak(n: int) -> float:
        trials.append(n)
        return 3.0 + 2.0 * n

    assert _furthest(peak, 4, 1024, 103.0) == 50
    assert len(trials) <= 4
    assert _furthest(peak, 4, 16, 103.0) == 16
    assert _furthest(peak, 4, 1024, 12.0) == 4


RESIDENT = """
import sys
from pathlib import Path
import test_plan as t
from spry_app.autodiff.memory import settle_allocator
settle_allocator()
print(t.resident(sys.argv[1]))
"""


def resident(name: str) -> float:
    """MiB that this process grows by in its second task, at its worst."""
    settings = config(name, **{"client.micro-batch": 8, "data.max-length": 128})
    way = next(way for way in ways(settings, model_of(settings), 2, ["all"]) if way.name == "backprop")
    task = get_task(way.config.data)
    node = node_of(load_model(way.config.model, way.config.adapter, 3, 0, task=task), task, BATCH, 128)
    client = way.config.client.model_copy(update={"local_steps": 1})
    run = way.config.model_copy(update={"client": client})
    asked = Task(1, 0, node.start, way.units, "", directions=2)
    train(node, asked, way.method, run, Slices(8, 1))
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    train(node, asked, way.method, run, Slices(8, 1))
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_grows_by_what_was_predicted(tmp_path: Path) -> None:
    """Backprop on four blocks of width 512: tens of MiB, so that a tenth is more than what libraries keep."""
    shape = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
    BertForSequenceClassification(
        BertConfig(vocab_size=512, max_position_embeddings=128, num_labels=3, **shape)
    ).save_pretrained(tmp_path)
    for file in Path(write_checkpoint(tmp_path / "other", "bert")).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    settings = config(str(tmp_path), **{"client.micro-batch": 8, "data.max-length": 128})
    predictor = Predictor(model_of(settings), host=True)
    way = next(way for way in ways(settings, predictor.adapted, 2, ["all"]) if way.name == "backprop")
    predicted = predictor.peaks(way, Slices(8, 1))[0]
    paths = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path)], capture_output=True, text=True, env=paths, check=True
    )
    grown = float(done.stdout.splitlines()[-1])
    print(f"predicted {predicted:.1f}, resident {grown:.1f} MiB")
    assert predicted > 50 and grown == pytest.approx(predicted, rel=0.1)
