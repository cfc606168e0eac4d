"""Whole federations on causal language modelling, over Flower's protobuf: what they learn and what they leave."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import LocalGrid, same
from peft import PeftModel
from test_causal_lm import truth
from tiny_causal import causal_checkpoint, instructions
from transformers import AutoModelForCausalLM, AutoTokenizer

from spry_app.autodiff.budget import SMALLEST
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.client.node import load_node
from spry_app.client.trust import check_gradient
from spry_app.config import RunConfig
from spry_app.data import load_corpus
from spry_app.errors import SpryError
from spry_app.models import save_adapter
from spry_app.protocol import from_arrays
from spry_app.server.export import export
from spry_app.server.picture import draw
from spry_app.server.rebuild import rebuild
from spry_app.server.run import Federated, _write_result, federate
from spry_app.tasks import TASKS

CLIENTS = 3


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("causal")
    return {
        "method": "spry",
        "data.task": "causal-lm",
        "model.name": causal_checkpoint(folder / "model"),
        "data.source": instructions(folder / "train.jsonl", 48),
        "data.test": instructions(folder / "test.jsonl", 10, offset=500),
        "data.partition": "iid",
        "data.max-length": 96,
        "adapter.rank": 2,
        "client.learning-rate": 0.02,
        "client.batch-size": 8,
        "client.local-steps": 1,
        "client.directions": 2,
        "server.learning-rate": 0.02,
        "num-server-rounds": 2,
        "server.evaluate-every": 2,
    }


def run(run_config: dict[str, Any], folder: Path, **grid: Any) -> Federated:
    return federate(LocalGrid(CLIENTS, run_config, **grid), RunConfig.from_flower(run_config), folder)  # type: ignore


def test_a_federation_learns_to_answer_and_says_so(run_config: dict, tmp_path: Path) -> None:
    """From the answers alone. The target ends the run once its model has one token in ten thousand right."""
    every = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj,gate_proj,lm_head"
    keys = {"method": "fedavg", "client.optimizer": "adam", "client.learning-rate": 0.05, "client.local-steps": 6}
    keys |= {"adapter.targets": every, "stop.target-accuracy": 1e-4, "server.evaluate-every": 1}
    done = run(run_config | keys | {"num-server-rounds": 6}, tmp_path)
    first, *_, last = done.recorder.rounds
    assert first.loss is not None and last.loss is not None and last.loss < 0.7 * first.loss
    assert first.metrics is not None and set(first.metrics) == {"perplexity", "token-accuracy", "exact-match"}
    assert first.main == 0.0 and last.main is not None and last.main > 1e-4 and last.accuracy is None
    assert last.personalised is not None and last.personalised.keys() == first.metrics.keys()
    assert done.recorder.stopped == f"target-accuracy 0.0001 reached in round {last.round}"
    _write_result(tmp_path, done.recorder, done.method, {})
    result = json.loads((tmp_path / "result.json").read_text())
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["main-metric"] == line["main-metric"] == "token-accuracy" and line["accuracy"] is None
    assert result["token-accuracy-after"] == line["metrics"]["token-accuracy"] == last.main
    assert result["metrics-after"] == line["metrics"]
    draw(done.recorder.rounds, tmp_path / "picture.png", "a title")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_packed_rows_are_learned_from_by_forward_mode(run_config: dict, tmp_path: Path) -> None:
    keys = {"data.packing": True, "adapter.kind": "layernorm", "adapter.rank": 1, "client.optimizer": "adam"}
    keys |= {"client.learning-rate": 0.05, "client.local-steps": 6, "client.batch-size": 4}
    keys |= {"client.directions": 8, "num-server-rounds": 3, "server.evaluate-every": 3}
    first, *_, last = run(run_config | keys, tmp_path).recorder.rounds
    assert first.loss is not None and last.loss is not None and last.loss < first.loss - 0.1


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration"])
def test_a_run_goes_on_where_it_ended_and_is_rebuilt_from_its_scalars(
    method: str, run_config: dict, tmp_path: Path
) -> None:
    """There is no head, so nothing but scalars is sent, and no exact.safetensors is kept."""
    run_config = run_config | {"method": method}
    whole = run(run_config, tmp_path / "whole")
    run(run_config | {"num-server-rounds": 1}, tmp_path / "parts")
    parts = run(run_config | {"resume": str(tmp_path / "parts")}, tmp_path / "parts", node_ids=(9, 6, 3))
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    assert not list(tmp_path.glob("*/exact.safetensors"))
    if method == "spry-per-iteration":
        assert rebuild(tmp_path / "parts" / "slopes.jsonl", tmp_path / "adapter") == 2
        save_adapter(whole.adapted, from_arrays(whole.arrays), tmp_path / "direct")
        weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "direct")]
        assert weights[0] == weights[1]


def test_peft_loads_what_is_saved_and_says_what_was_last_evaluated(run_config: dict, tmp_path: Path) -> None:
    """On an AutoModelForCausalLM, with the template that the run asked by."""
    done = run(run_config, tmp_path)
    save_adapter(done.adapted, from_arrays(done.arrays), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM" and not settings["modules_to_save"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run_config["model.name"]), str(tmp_path / "adapter")
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    total = count = right = 0.0
    for row in map(json.loads, Path(run_config["data.test"]).read_text().splitlines()):
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = tokenizer(row["completion"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([before, answer], 1)).logits[0, before.shape[1] - 1 : -1]
            said = model.generate(before, max_new_tokens=answer.shape[1], do_sample=False, pad_token_id=0)
        total += torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
        count += answer.shape[1]
        right += said[0, before.shape[1] :].tolist() == answer[0].tolist()
    last = done.recorder.rounds[-1]
    assert last.loss == pytest.approx(total / count, rel=1e-5)
    assert last.metrics["exact-match"] == right / 10

    export(tmp_path / "adapter", tmp_path / "merged", "fp32", model=run_config["model.name"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(before).logits, model(input_ids=before).logits, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "library_name: transformers" in card
    code = card.split("```python\n")[1].split("```")[0].replace("<this folder>", str(tmp_path / "merged"))
    exec(code, names := {})
    answer = tokenizer.decode(names["say"].model.generate(before, max_new_tokens=4, do_sample=False, pad_token_id=0)[0])
    assert answer == tokenizer.decode(model.generate(before, max_new_tokens=4, do_sample=False, pad_token_id=0)[0])


def test_clients_score_where_the_server_has_no_test_set(run_config: dict, tmp_path: Path) -> None:
    """The sums of all nodes give the loss of all their tokens, whoever has more of them."""
    keys = run_config | {"data.test": "", "num-server-rounds": 1, "server.evaluate-every": 1, "data.holdout": 0.3}
    done = run(keys, tmp_path)
    config = RunConfig.from_flower(keys)
    nodes = [load_node(config, {"partition-id": n, "num-partitions": CLIENTS}) for n in range(CLIENTS)]
    done.adapted.load_tensors(from_arrays(done.arrays))
    losses = [(truth(done.adapted, node.heldout)[0], sum(node.heldout.terms)) for node in nodes]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert done.recorder.rounds[-1].loss == pytest.approx(expected, rel=1e-5)


def test_what_enters_the_lowest_trained_block_is_kept_for_this_task_too(run_config: dict, tmp_path: Path) -> None:
    keys = run_config | {"adapter.targets": "layers.1.self_attn.q_proj,layers.1.self_attn.v_proj"}
    keys |= {"client.local-steps": 4}
    results = []
    for mib in (0, 64):
        done = run(keys | {"client.prefix-cache-mib": mib}, tmp_path / str(mib))
        results.append((from_arrays(done.arrays), done.recorder.rounds[-1]))
    (off, line), (on, other) = results
    assert other.forwards < 0.95 * line.forwards and other.loss == pytest.approx(line.loss, rel=1e-4)
    for name, value in off.items():
        torch.testing.assert_close(on[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_budget_of_memory_is_kept_and_one_that_is_too_small_is_refused(run_config: dict, tmp_path: Path) -> None:
    small = {"num-server-rounds": 1, "client.batch-size": 2}
    done = run(run_config | {"client.memory-budget-mib": 8} | small, tmp_path / "enough")
    assert done.recorder.rounds[-1].answered == CLIENTS
    with pytest.raises(SpryError, match=r"A step on one example takes .* data\.max-length \(now 96\)"):
        run(run_config | {"client.memory-budget-mib": 0.001} | small, tmp_path / "small")


def test_a_node_with_its_own_file_needs_no_names_of_classes(run_config: dict, tmp_path: Path) -> None:
    config = RunConfig.from_flower(run_config | {"data.source": "no-such-file.jsonl"})
    own = instructions(tmp_path / "own.jsonl", 12)
    node = load_node(config, {"data": own})
    assert len(node.train) + len(node.heldout) == 12 and node.train.task is TASKS["causal-lm"]
    assert load_corpus(RunConfig.from_flower(run_config).data).label_names == ()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_model_keeps_its_output_layer_and_has_sound_slopes(
    quantization: str, run_config: dict, tmp_path: Path
) -> None:
    """On the CPU too. Blocks are packed; what makes logits is not, and is what the checkpoint has."""
    config = RunConfig.from_flower(run_config | {"model.quantization": quantization})
    node = load_node(config, {"partition-id": 0, "num-partitions": CLIENTS})
    base = node.adapted.model.get_base_model()
    assert type(base.get_output_embeddings()) is torch.nn.Linear
    assert type(base.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    check_gradient(node, GRADIENTS["forward-mode"], at_once=2)
    assert math.isfinite(node.score(config.client, SMALLEST).loss)
