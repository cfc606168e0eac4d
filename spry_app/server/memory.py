"""What clients' steps take: that of a run beside what backpropagation would take, measured on the server's model; and
the smallest step of each gradient on the units from each block up, predicted on tensors without data.
"""

import functools
from collections.abc import Set
from contextlib import nullcontext

from spry_app.autodiff.budget import SMALLEST
from spry_app.autodiff.directions import Seed
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import GRADIENTS, Gradient
from spry_app.autodiff.memory import on_the_host, peak_mib, with_peak
from spry_app.autodiff.workspace import workspace
from spry_app.config import RunConfig
from spry_app.data import label_names
from spry_app.methods import Method, StepMemory
from spry_app.methods.replay import exact_names
from spry_app.models import AdaptedModel
from spry_app.models.skeleton import skeleton
from spry_app.objectives import batch_of, head_cut
from spry_app.tasks import Encoded

MARGIN = 1.1
"""Of what is predicted, for what it may miss (a test holds it to a tenth): a node that has less than a step takes
refuses it, and is then dealt half as much for the rest of the run.
"""


def step_memory(adapted: AdaptedModel, rows: Encoded, config: RunConfig, method: Method) -> StepMemory:
    """(gradient, lowest block) -> MiB that a node must have for the smallest step on the units from there up, above the
    loaded model: what it takes, and a MARGIN.

    One example, the longest of `rows`, and one direction at once, with the smallest temporaries: a node with more makes
    more of it (client.slicing). Each is predicted when it is first asked for, for clients that compute on the CPU if
    the server does; an exact step that a strong node can take may be more than the server's own memory holds.
    """
    longest = max(range(len(rows)), key=rows.length)
    labels = len(label_names(config.data))
    shape = skeleton(config.model, config.adapter, rows.task, labels, adapted.tokenizer)
    depths, seed = adapted.depths(), Seed(run=config.seed, round=0, client=0, step=0)

    @functools.cache
    def mib(gradient: str, lowest: int) -> float:
        own = method.taking(gradient)
        tensors = {name: value for name, value in adapted.tensors().items() if depths[name] >= lowest}
        exact = exact_names(adapted.units, own, config.head_gradient) & tensors.keys()
        where = on_the_host() if adapted.device.type == "cpu" else nullcontext()
        with where, workspace(SMALLEST.workspace_bytes):
            batch = batch_of(shape, rows, [longest], 1, seed)
            tried = functools.partial(head_cut, own.gradient, shape, rows, exact, tensors)
            cut = with_peak(tried, shape.device)[0]
            step = functools.partial(estimate_with_exact, own.gradient, batch, tensors, exact, seed, 1, 1, cut)
            return MARGIN * peak_mib(step, shape.device)

    return mib


def step_peaks(adapted: AdaptedModel, rows: Encoded, config: RunConfig, method: Method) -> dict[str, float]:
    """MiB above the loaded model at the worst moment of one step on all units, for "run" and for "backprop"."""
    client = config.client
    indices = range(min(client.batch_size, len(rows)))
    seed, tensors = Seed(run=config.seed, round=0, client=0, step=0), adapted.tensors()
    most = config.most_rows_at_once
    batch = batch_of(adapted, rows, indices, min(client.micro_batch or most, most), seed)

    def peak(gradient: Gradient, exact: Set[str]) -> float:
        step = functools.partial(
            estimate_with_exact,
            gradient,
            batch,
            tensors,
            exact,
            seed,
            client.directions,
            client.directions_at_once,
            head_cut(gradient, adapted, rows, exact, tensors),
        )
        return peak_mib(step, adapted.device)

    exact = exact_names(adapted.units, method, config.head_gradient)
    return {"run": peak(method.gradient, exact), "backprop": peak(GRADIENTS["backprop"], set())}
