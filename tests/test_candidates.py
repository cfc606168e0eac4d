"""FwdLLM's directions: the nearest of the candidates, as many as the variance asks for, one in memory at a time."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, same, tiny_run
from flwr.app import Message
from torch import Tensor

from spry_app.autodiff.candidates import nearest
from spry_app.autodiff.directions import Seed, direction
from spry_app.autodiff.gradients import GRADIENTS, central
from spry_app.autodiff.slopes import Part
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import get_method
from spry_app.protocol import Task

SEED = Seed(1, 2, 3, 4)
PARAMS = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
GUIDE = {"a": torch.linspace(-1, 2, 12).reshape(3, 4), "b": torch.linspace(1, -1, 5)}
TRUTH = {"a": torch.linspace(0, 1, 12).reshape(3, 4), "b": torch.linspace(-1, 3, 5)}


def batch() -> list[Part]:
    """A linear loss, whose slope along v is TRUTH . v."""
    return [Part(lambda params: 1.0 + sum((params[name] * TRUTH[name]).sum() for name in TRUTH), 1.0)]  # type: ignore


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in PARAMS])


def by_brute_force(candidates: int) -> Tensor:
    """slope * v of each candidate, in float64, the nearest first; shape (candidates, numbers)."""
    drawn = torch.stack([flat(direction(SEED, k, PARAMS)) for k in range(candidates)])
    order = torch.nn.functional.cosine_similarity(drawn, flat(GUIDE)[None]).abs().argsort(descending=True)
    drawn = drawn[order]
    return (drawn @ flat(TRUTH))[:, None] * drawn


def test_the_nearest_candidates_are_used_and_no_other() -> None:
    gradient = nearest(central(1e-2), GUIDE, candidates=20, threshold=0.0)
    estimate = gradient.estimate(batch(), PARAMS, SEED, 5, 1)
    assert len(estimate.slopes) == 5
    torch.testing.assert_close(flat(estimate.gradient), by_brute_force(20)[:5].mean(0), rtol=1e-3, atol=1e-4)
    assert estimate.loss == pytest.approx(1.0, abs=1e-4)


def test_the_estimate_is_rebuilt_from_its_slopes_to_the_bit() -> None:
    gradient = nearest(GRADIENTS["forward-mode"], GUIDE, candidates=9, threshold=0.0)
    estimate = gradient.estimate(batch(), PARAMS, SEED, 3, 1)
    assert same(gradient.combine(estimate.slopes, SEED, PARAMS), estimate.gradient)
    assert not same(GRADIENTS["forward-mode"].combine(estimate.slopes, SEED, PARAMS), estimate.gradient)


def test_directions_are_added_until_the_variance_of_their_mean_is_under_the_threshold() -> None:
    """Variance by the textbook: of n estimates over n, averaged over the numbers; thresholds between its values."""
    terms = by_brute_force(12)
    variances = [(terms[:n].var(0, correction=1) / n).mean().item() for n in range(2, 13)]
    wanted = [next((n + 2 for n, v in enumerate(variances) if v <= t), 12) for t in (1e9, *variances, 0.0)]
    assert len(set(wanted)) > 3
    for threshold, count in zip((1e9, *variances, 0.0), wanted, strict=True):
        gradient = nearest(central(1e-2), GUIDE, candidates=12, threshold=threshold * 1.01)
        estimate = gradient.estimate(batch(), PARAMS, SEED, 12, 1)
        assert len(estimate.slopes) == count
        assert estimate.cost.forwards(suffix=1.0) == 2 * count


def test_without_a_last_update_the_first_directions_are_used() -> None:
    base = central(1e-2)
    assert nearest(base, {}, 9, 0.0).estimate(batch(), PARAMS, SEED, 3, 1).slopes == pytest.approx(
        base.estimate(batch(), PARAMS, SEED, 3, 1).slopes
    )


def test_one_direction_is_in_memory_at_a_time() -> None:
    """Directions are numpy's memory: with 2 candidates or 12 the peak is the same, far below 12 directions."""
    params, peaks = {"w": torch.zeros(500_000)}, []
    for candidates in (2, 12):
        gradient = nearest(central(1e-2), {"w": torch.ones(500_000)}, candidates, 0.0)
        tracemalloc.start()
        gradient.estimate([Part(lambda params: params["w"].mean(), 1.0)], params, SEED, candidates, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[0] < 4 * params["w"].nbytes


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny")) | {"server.fraction-evaluate": 0.0}


@pytest.mark.parametrize("method", ["fwdllm", "fedmezo"])
def test_the_last_update_goes_with_the_task_where_directions_are_chosen_by_it(
    method: str, run_config: dict, tmp_path: Path
) -> None:
    """None in the first round; then the change of the tensors that have slopes, which the head has not."""
    federation = Federation(tmp_path, run_config | {"method": method})
    tasks: dict[int, Task] = {}

    def watch(partition: int, reply: Message) -> Message:
        if partition == 0:
            task = next(iter(federation.strategy.tasks.values()))
            tasks[task.round] = task
        return reply

    federation.start(3, rounds=3, tamper=watch)
    assert tasks[1].update == {}
    changes = {name: value - tasks[2].tensors[name] for name, value in tasks[3].tensors.items() if "lora" in name}
    assert same(tasks[3].update, changes if method == "fwdllm" else {})


def test_a_choice_of_directions_needs_slopes_and_weights() -> None:
    with pytest.raises(SpryError, match="needs a gradient made of slopes"):
        get_method(RunConfig(method="fwdllm", gradient="backprop"))
