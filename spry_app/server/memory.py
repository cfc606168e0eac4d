"""The peak memory of a client's step beside what backpropagation would take: same rows, same units, same process."""

import functools
from collections.abc import Set

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import GRADIENTS, Gradient
from spry_app.autodiff.memory import peak_mib
from spry_app.config import RunConfig
from spry_app.methods import Method
from spry_app.methods.replay import exact_names
from spry_app.models import AdaptedModel
from spry_app.objectives import batch_of, head_cut
from spry_app.tasks import Encoded


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
