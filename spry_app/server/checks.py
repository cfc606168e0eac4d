"""Is a reply fit to be averaged? Names, shapes, numbers within reason, and nothing that was not asked for."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from spry_app.autodiff.costs import Cost
from spry_app.autodiff.gradients import Gradient
from spry_app.config import ClientConfig
from spry_app.methods import Method
from spry_app.methods.replay import local_steps
from spry_app.protocol import LARGEST, MOST_EXAMPLES, Task, Tensors, TrainReply, mismatch


@dataclass(frozen=True)
class Asked:
    """tensors: those that must come as they are. steps: local ones, 0 where nobody but the node knows. slopes: scalars
    that must come of each, 0 for none. passes: forward passes that an example can have taken in a step. examples: that
    can have been trained on in all steps. score: whether a score of held-out rows may come. partial: whether fewer
    steps will do. most_steps: no more than so many; 0 for all.
    """

    tensors: Tensors
    steps: int
    slopes: int
    passes: float
    examples: int
    score: bool
    partial: bool = False
    most_steps: int = 0

    @classmethod
    def of(
        cls,
        task: Task,
        tensors: Tensors,
        exact: Collection[str],
        gradient: Gradient,
        method: Method,
        config: ClientConfig,
    ) -> Self:
        """tensors: of the task's units. exact: those that no scalar stands for. gradient: of the task."""
        as_they_are = tensors.keys() & exact if method.reply == "slopes" else tensors.keys()
        steps = local_steps(method, config)
        return cls(
            tensors={name: tensors[name] for name in as_they_are},
            steps=steps,
            slopes=task.directions * gradient.slopes_per_direction if tensors.keys() - as_they_are else 0,
            passes=most_forwards(gradient, task.directions),
            examples=most_examples(steps, config),
            score=task.evaluate,
            partial=task.deadline_s > 0,
            most_steps=task.steps,
        )


def problem(reply: TrainReply, asked: Asked) -> str:
    """Why the reply must be refused; empty if it is fine."""
    if not abs(reply.loss) <= LARGEST:
        return f"its loss is {reply.loss}"
    if not (0 <= reply.peak_mib <= LARGEST and 0 <= reply.seconds <= LARGEST) or (
        reply.personal is not None and not (asked.score and reply.personal.examples)
    ):
        return f"its measurements are impossible: peak {reply.peak_mib} MiB, {reply.seconds} s, score {reply.personal}"
    if reason := _step_problem(reply, asked):
        return reason
    most = asked.examples * reply.steps // reply.steps_asked
    if not 1 <= reply.examples <= most:
        return f"it was trained on {reply.examples} examples; it can be 1 to {most}"
    # None at all where a head is trained on hidden states that were at hand.
    if not 0 <= reply.forwards <= reply.examples * asked.passes * (1 + 1e-6):
        return f"its {reply.examples} examples cannot have taken {reply.forwards} forward passes"
    return mismatch(reply.tensors, asked.tensors) or _slope_problem(reply, asked)


def most_forwards(gradient: Gradient, directions: int) -> float:
    """Passes of one example in a step at the most: no direction shares one, and head and prefix take one each."""
    return (gradient.cost(directions, 1) + Cost(passes=2)).forwards(suffix=1.0)


def most_examples(steps: int, config: ClientConfig) -> int:
    """That a node can have trained on in `steps` steps; in whole epochs (0) nobody but the node knows."""
    return steps * config.batch_size if steps else MOST_EXAMPLES * config.local_epochs


def _step_problem(reply: TrainReply, asked: Asked) -> str:
    whole = asked.steps or reply.steps_asked
    most = min(whole, asked.most_steps or whole)
    least = 1 if asked.partial else most
    if reply.steps_asked != whole or not 1 <= whole <= MOST_EXAMPLES or not least <= reply.steps <= most:
        told = f"{'1' if asked.partial else asked.most_steps or 'all'} of {asked.steps or 'them'}"
        more = f", at most {asked.most_steps}" if asked.most_steps else ""
        return f"it did {reply.steps} of {reply.steps_asked} local steps; asked for were at least {told}{more}"
    return ""


def _slope_problem(reply: TrainReply, asked: Asked) -> str:
    steps = reply.steps if asked.slopes else 0
    if len(reply.slopes) != steps or any(len(step) != asked.slopes for step in reply.slopes):
        got = f"{len(reply.slopes)} steps of {len(reply.slopes[0]) if reply.slopes else 0}"
        return f"it holds {got} slopes; asked for were {steps} steps of {asked.slopes}"
    if not all(math.isfinite(slope) for step in reply.slopes for slope in step):
        return "a slope is not finite"
    if any(abs(slope) > LARGEST for step in reply.slopes for slope in step):
        return f"a slope is beyond {LARGEST:g}"
    return ""
