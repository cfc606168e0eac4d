"""The update that scalars stand for: client and server both come here, so they get the same bits."""

from collections.abc import Mapping, Sequence

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import Gradient
from spry_app.config import ClientConfig
from spry_app.methods.method import Method
from spry_app.optimizers import CLIENT_OPTIMIZERS, NamedOptimizer, Rule

HEAD = "head"
"""Name of the unit that is the classification head."""


def client_rule(config: ClientConfig) -> Rule:
    """The local optimizer that the run config asks for."""
    return Rule(config.optimizer, config.learning_rate, weight_decay=config.weight_decay)


def local_steps(method: Method, config: ClientConfig) -> int:
    """Local steps a round where their number is fixed; 0 where it follows from the epochs and the shard."""
    return config.local_steps or (0 if method.reply == "weights" else 1)


def exact_names(units: Mapping[str, Sequence[str]], method: Method, head_gradient: str) -> set[str]:
    """Tensors whose gradient is exact although the method uses slopes: they travel as they are, never as scalars."""
    return set(units.get(HEAD, ())) if method.gradient.slopes and head_gradient == "exact" else set()


def replay(start: Tensors, slopes: Sequence[Sequence[float]], seed: Seed, rule: Rule, gradient: Gradient) -> Tensors:
    """Repeat a client's local steps from what it measured (SPRY's per-iteration mode, arXiv:2405.15551).

    start: the client's tensors before its first step. slopes: K numbers for each of the T steps. seed: of step 0.
    gradient: the way they were measured, which knows what they stand for.
    """
    if not start:
        return {}
    optimizer = NamedOptimizer(start, CLIENT_OPTIMIZERS, rule)
    for step, measured in enumerate(slopes):
        at = Seed(run=seed.run, round=seed.round, client=seed.client, step=seed.step + step)
        optimizer.step(gradient.combine(measured, at, start))
    return optimizer.tensors
