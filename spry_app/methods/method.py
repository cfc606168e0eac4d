"""What a federated method is: a small value made of independent choices. Nothing here computes or communicates."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from spry_app.autodiff.gradients import GRADIENTS, Gradient
from spry_app.config import ClientConfig
from spry_app.errors import SpryError
from spry_app.methods.assignment import Assign, every_unit
from spry_app.methods.fit import Fit, Layout, as_it_is
from spry_app.methods.pick import FIRST, Pick
from spry_app.optimizers import SERVER_OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class Method:
    """One federated method: a row of the table.

    gradient: how a client gets a gradient.
    fit: what becomes of it on the model at hand.
    pick: which directions are used, and how many.
    assign: which client trains which units.
    reply: what travels up: "weights" of the trained units after local training; only the "slopes" (scalars), from
        which the server repeats the client's steps; or the "gradient" of the units, with no step on the client.
    send: what travels down: "weights", or the slope "log" of the rounds that a client has missed, from which it
        repeats the server's steps.
    directions: "gaussian" ones, or "orthogonal" ones, of which clients that hold the same units take disjoint parts.
    seeds: each client draws directions of its "own", or all clients of a round "shared" ones, so that their scalars can
        be averaged.
    server_optimizer: key of optimizers.SERVER_OPTIMIZERS.
    paper: where the method comes from.
    """

    gradient: Gradient
    fit: Fit = as_it_is
    pick: Pick = FIRST
    assign: Assign = every_unit
    reply: Literal["weights", "slopes", "gradient"] = "weights"
    send: Literal["weights", "log"] = "weights"
    directions: Literal["gaussian", "orthogonal"] = "gaussian"
    seeds: Literal["own", "shared"] = "own"
    server_optimizer: str = "average"
    paper: str

    def __post_init__(self) -> None:
        if self.reply == "slopes" and self.gradient.slopes is None:
            raise ValueError(
                f'reply="slopes" needs a gradient made of slopes; {self.gradient.name} has none: use "weights".'
            )
        if self.reply != "slopes" and (self.send, self.seeds) != ("weights", "own"):
            raise ValueError(
                f'send={self.send!r} with seeds={self.seeds!r} needs reply="slopes", as only scalars can be logged and '
                f'averaged along shared directions; got reply={self.reply!r}: use send="weights" and seeds="own".'
            )
        if self.pick.needs_update and (self.gradient.slopes is None or self.reply == "slopes"):
            raise ValueError(
                f"directions are chosen near the last update, which needs a gradient made of slopes and a reply other "
                f'than "slopes", as their number is not fixed; got {self.gradient.name} and reply={self.reply!r}.'
            )
        if self.pick.needs_update and self.directions == "orthogonal":
            raise ValueError(
                'directions are chosen near the last update among independent ones; directions must be "gaussian", '
                'not "orthogonal".'
            )
        if self.server_optimizer not in SERVER_OPTIMIZERS:
            raise ValueError(f"server_optimizer={self.server_optimizer!r}; known: {', '.join(SERVER_OPTIMIZERS)}.")
        if self.reply == "gradient" and self.server_optimizer == "average":
            raise ValueError('reply="gradient" needs a server_optimizer with a step size, e.g. "sgd", not "average".')
        if not self.paper:
            raise ValueError("A Method names its source: paper must not be empty.")

    def on(self, layout: Layout, config: ClientConfig) -> Self:
        """The method as it runs on a model, for server and clients alike. Raises what `fit` raises, SpryError."""
        return replace(self, gradient=self.fit(self.gradient, layout, config), fit=as_it_is)

    def taking(self, gradient: str) -> Self:
        """The method of a client that takes another gradient of the table than the method's; "" for that.

        An exact one has no directions to pick. To be asked of what `on` has made. Raises SpryError where the server
        could not repeat its steps from the slopes that it is to reply with, or there is no gradient of that name.
        """
        if gradient in ("", self.gradient.name):
            return self
        if gradient not in GRADIENTS:
            raise SpryError(f"A client was given gradient={gradient[:200]!r}; known: {', '.join(GRADIENTS)}.")
        chosen, own = GRADIENTS[gradient], self.gradient
        stand_for_the_same = chosen.slopes and chosen.combine is own.combine and own.slopes_per_direction == 1
        if self.reply == "slopes" and not stand_for_the_same:
            raise SpryError(
                f"A client was given gradient={gradient!r}, others {self.gradient.name}, and all reply with slopes, "
                "from which the server repeats their steps: these must be of one kind. Use a method with "
                'reply="weights" or "gradient" (method="spry", "fedavg", "fedsgd"), or an assign that gives all '
                'clients one gradient ("every-unit", "cyclic", "by-depth").'
            )
        return replace(self, gradient=chosen, pick=self.pick if chosen.slopes else FIRST)
