"""The one gradient of a run that leaves it open (gradient="auto"): chosen when its nodes have introduced themselves,
before the first round, and kept in the folder of the run. What a step takes is predicted elsewhere.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from logging import INFO
from pathlib import Path

from flwr.common.logger import log

from spry_app.atomic import write_whole
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.config import RunConfig
from spry_app.errors import SpryError

NAME = "gradient.json"


@dataclass(frozen=True)
class Choice:
    """gradient: a name of GRADIENTS. reason: a sentence or two on why."""

    gradient: str
    reason: str


Advise = Callable[[RunConfig, Sequence[float], Sequence[tuple[str, ...]]], Choice]
"""(run config; of each node the MiB that a step may take, 0.0 where it has not said, and the gradients that it can
take) -> what all should take. Raises SpryError where that cannot be said, or nothing fits.
"""


class OneGradient:
    """Asks `advise` once; a run that is resumed goes on with what it has kept. SpryError where that is broken."""

    def __init__(self, config: RunConfig, folder: Path, advise: Advise) -> None:
        self._config, self._path, self._advise = config, folder / NAME, advise
        self._choice = _read(self._path) if config.resume else None

    def __call__(self, memory_mib: Sequence[float], gradients: Sequence[tuple[str, ...]]) -> str:
        """As fleet.Choose."""
        if self._choice is None:
            self._choice = self._advise(self._config, memory_mib, gradients)
            write_whole(self._path, json.dumps(asdict(self._choice)) + "\n")
            log(INFO, 'gradient="auto" is %s', self._choice.reason)
        return self._choice.gradient

    @property
    def gradient(self) -> str:
        """What was chosen; "" before."""
        return self._choice.gradient if self._choice else ""


def _read(path: Path) -> Choice | None:
    """None for a run that ended before it came to choose."""
    try:
        if not path.exists():
            return None
        found = Choice(**json.loads(path.read_text()))
        if found.gradient not in GRADIENTS:
            raise ValueError(f"no gradient is called {str(found.gradient)[:200]!r}")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SpryError(
            f'{path} cannot be read ({error}). A run with gradient="auto" keeps there what it chose; to choose again '
            "might give another run, so set gradient to what its log says and begin anew."
        ) from None
