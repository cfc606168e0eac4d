"""The method FedSPZO on small models: which blocks run, what the server rebuilds, which models are refused."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, LocalGrid, make_rows, same, tiny_run
from flwr.app import Context, RecordDict
from tiny_models import ALL_MODELS, tiny_base
from torch import nn

from spry_app.autodiff.budget import Slices
from spry_app.autodiff.directions import Seed, direction
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import Estimate
from spry_app.autodiff.slopes import Halves, Part
from spry_app.client.node import Node, load_node
from spry_app.client.slicing import slices_of
from spry_app.client.training import train
from spry_app.client.trust import check_gradient
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, Layout, Method, get_method
from spry_app.objectives import batch_of
from spry_app.prefix import may_start_at
from spry_app.protocol import Task
from spry_app.server.run import run

P1, P2 = 3, 4
SEED = Seed(1, 2, 3, 4)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    own = {"method": "fedspzo", "client.directions": P1, "client.upper-directions": P2, "client.micro-batch": 4}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | own


def loaded(keys: dict[str, Any]) -> tuple[RunConfig, Node, Method]:
    config = RunConfig.from_flower(keys)
    node = load_node(config, {"partition-id": 0, "num-partitions": 1})
    return config, node, get_method(config).on(layout(node), config.client)


def layout(node: Node) -> Layout:
    return Layout(node.adapted.depths(), len(node.adapted.blocks))


@pytest.fixture
def passes(keys: dict[str, Any]) -> Iterator[list[list[int]]]:
    """Rows of every pass through the lower and the upper block."""
    _, node, _ = loaded(keys)
    check_gradient(node, loaded(keys)[2].gradient, 1)
    seen: list[list[int]] = [[], []]
    hooks = []
    for index, name in enumerate(node.adapted.blocks):
        inside = next(part for part in node.adapted.model.get_submodule(name).modules() if type(part) is nn.Linear)
        hooks.append(inside.register_forward_hook(lambda _, i, out, index=index: seen[index].append(len(out))))
    yield seen
    for hook in hooks:
        hook.remove()


def step(keys: dict[str, Any], names: set[str] | None = None, exact: bool = False) -> Estimate:
    _, node, method = loaded(keys)
    tensors = {n: t for n, t in node.adapted.tensors().items() if names is None or n in names}
    batch = batch_of(node.adapted, node.train, range(8), 4, SEED)
    head = set(node.adapted.units["head"]) if exact else set()
    return estimate_with_exact(method.gradient, batch, tensors, head, SEED, P1)


@pytest.mark.parametrize("exact", [False, True])
def test_the_blocks_run_as_often_as_promised(keys: dict[str, Any], passes: list[list[int]], exact: bool) -> None:
    """Two micro-batches: 2 P1 times below the cut, 2 P1 P2 times above, and once each for an exact head."""
    cost = step(keys, exact=exact).cost
    assert [len(rows) for rows in passes] == [2 * (2 * P1 + exact), 2 * (2 * P1 * P2 + exact)]
    assert cost.forwards(1.0) == 0.5 * (2 * P1 + exact) + 0.5 * (2 * P1 * P2 + exact)


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_blocks_below_the_units_of_a_client_run_once_and_are_counted_once(
    keys: dict[str, Any], passes: list[list[int]], cache_mib: int
) -> None:
    """Units of the upper block, two steps of eight rows; what the client reports is what ran."""
    config, node, method = loaded(keys | {"client.prefix-cache-mib": cache_mib, "client.local-steps": 2})
    assert may_start_at(node.adapted, node.train, 1)  # tries it, once a process
    for rows in passes:
        rows.clear()
    units = (*(unit for unit in node.adapted.units if ".layer.1." in unit), "head")
    task = Task(1, 0, node.adapted.tensors(), units, node.adapted.fingerprint, directions=config.client.directions)
    reply = train(node, task, method, config, Slices(4, 1))
    # Not perturbed, so once for all directions, and once for the head; or once for both.
    assert sum(passes[0]) == (16 if cache_mib else 16 * (1 + 1))
    assert sum(passes[1]) == 16 * (2 * P1 * P2 + 1)
    assert reply.forwards == pytest.approx((sum(passes[0]) + sum(passes[1])) / 2)


@pytest.mark.parametrize("cut", [1, 2])
def test_the_two_halves_are_the_whole(keys: dict[str, Any], cut: int) -> None:
    _, node, _ = loaded(keys)
    tensors = node.adapted.tensors()
    there = {name: value + 0.1 * direction(SEED, 0, tensors)[name] for name, value in tensors.items()}
    for part in batch_of(node.adapted, node.train, range(8), 4, SEED):
        assert part.halves is not None
        halves = part.halves(cut)
        with torch.no_grad():
            torch.testing.assert_close(halves.upper(there, halves.lower(there)), part.objective(there))


def test_masks_of_dropout_are_the_same_in_every_loss_of_a_step(keys: dict[str, Any]) -> None:
    _, node, _ = loaded(keys | {"adapter.dropout": 0.5})
    tensors = {n: t + 0.5 for n, t in node.adapted.tensors().items()}
    first, other = (batch_of(node.adapted, node.train, range(4), 4, Seed(0, 0, 0, step))[0] for step in (0, 1))
    assert first.halves and other.halves
    with torch.no_grad():
        once, again = (first.halves(1).upper(tensors, first.halves(1).lower(tensors)) for _ in range(2))
        later = other.halves(1).upper(tensors, other.halves(1).lower(tensors))
    assert once == again
    assert once != later


def test_tensors_are_cut_where_the_config_says(keys: dict[str, Any]) -> None:
    _, node, _ = loaded(keys)
    depths = node.adapted.depths()
    assert {depths[name] for name in node.adapted.units["head"]} == {2}
    assert {d for n, d in depths.items() if ".layer.1." in n} == {1}
    assert [loaded(keys | {"client.cut": cut})[2].gradient.cut for cut in (0, 1, 2)] == [1, 1, 2]
    with pytest.raises(SpryError, match=r"client\.cut=3 .* has 2 blocks.* from 1 to"):
        loaded(keys | {"client.cut": 3})


def test_the_server_rebuilds_what_clients_measured(keys: dict[str, Any], tmp_path: Path) -> None:
    """Scalars of two local steps against the weights that the same clients would have sent."""
    results = []
    for reply in ("slopes", "weights"):
        row = dataclasses.replace(METHODS["fedspzo"], reply=reply)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(METHODS, "fedspzo", row)
            federation = Federation(tmp_path / reply, keys)
            federation.start(2, rounds=2)
        assert federation.recorder.rounds[-1].answered == 2
        results.append(federation.strategy.snapshot())
    assert same(*results)


def test_the_step_fits_a_budget(keys: dict[str, Any]) -> None:
    config, node, method = loaded(keys | {"client.memory-budget-mib": 64.0})
    assert slices_of(node, method, config, RecordDict()).micro_batch == config.client.batch_size


def test_the_difference_is_taken_over_the_step_that_the_paper_names() -> None:
    """At 0, x^3 along u has the slope h^2 u^3; one number below the cut, none above."""
    config = RunConfig(method="fedspzo")
    way = get_method(config).on(Layout({"x": 0}, blocks=2), config.client).gradient
    halves = Halves(lambda p: p["x"] ** 3, lambda p, hidden: hidden.sum())
    params = {"x": torch.zeros(1, dtype=torch.float64)}
    found = way.estimate([Part(lambda p: (p["x"] ** 3).sum(), 1.0, lambda cut: halves)], params, SEED, 1, 1)
    assert found.slopes[0] == pytest.approx(1e-3**2 * float(direction(SEED, 0, params)["x"].double()) ** 3, rel=1e-6)


def checked(keys: dict[str, Any], family: str, folder: Path) -> None:
    """What a client does before the first round, on a tiny model of that family."""
    base, (_, node, _) = tiny_base(family), loaded(keys)
    base.save_pretrained(folder)
    node.train.tokenizer.save_pretrained(folder)
    own = {"model.name": str(folder), "adapter.targets": ",".join(ALL_MODELS[family][1]), "client.cut": 1}
    _, node, method = loaded(keys | own)
    check_gradient(node, method.gradient, 1)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "llama", "opt", "gpt2", "gemma2"])
def test_other_families_can_be_cut(keys: dict[str, Any], family: str, tmp_path: Path) -> None:
    checked(keys, family, tmp_path)


@pytest.mark.parametrize("family", ["deberta-v2", "albert"])
def test_a_model_whose_blocks_are_no_sequence_is_refused(keys: dict[str, Any], family: str, tmp_path: Path) -> None:
    with pytest.raises(SpryError, match=r"model cannot be cut at block 1 \(.*client\.cut to another"):
        checked(keys, family, tmp_path)


def test_a_run_fits_the_method_to_its_model_on_the_server_too(keys: dict[str, Any], tmp_path: Path) -> None:
    test = make_rows(tmp_path / "test.jsonl", 16, offset=500)
    own = keys | {"data.test": str(test), "output-dir": str(tmp_path / "outputs"), "client.cut": 2}
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=own)
    run(LocalGrid(2, own), context)  # type: ignore[arg-type]
    lines = (tmp_path / "outputs" / "7" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["answered"] for line in lines[1:]] == [2, 2]
