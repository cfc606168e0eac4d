"""The rows that a server scores its model on, and how far it is with that. What a score is, the task knows."""

import time
from logging import INFO, WARNING

from flwr.app import ArrayRecord
from flwr.common.logger import log

from spry_app.config import RunConfig
from spry_app.data import load_corpus
from spry_app.models import AdaptedModel
from spry_app.objectives import refuse_too_long, score
from spry_app.prefix import PrefixCache
from spry_app.protocol import Score, from_arrays
from spry_app.tasks import Encoded, encode_rows, get_task

BATCH = 32
EVERY_S = 10.0
"""Between two lines that tell how far a long evaluation is."""


def held_out(config: RunConfig, adapted: AdaptedModel) -> Encoded | None:
    """The rows of the test set; None where there is none."""
    test = load_corpus(config.data).test
    if test is None:
        return None
    rows = encode_rows(get_task(config.data), test, adapted.tokenizer, config.data, False)
    refuse_too_long(adapted, rows, "Rows of the test set")
    if rows.lost():
        log(WARNING, "Rows of the test set: %s", rows.lost())
    return rows


def score_of(adapted: AdaptedModel, rows: Encoded, bottom: PrefixCache | None, arrays: ArrayRecord) -> Score:
    """Of the model with the tensors in `arrays`, on all rows. bottom: hidden states that no training changes."""
    adapted.load_tensors(from_arrays(arrays))
    return score(adapted, rows, BATCH, bottom.entering if bottom else None, Progress(len(rows)))


class Progress:
    """Says from time to time how many rows of an evaluation are done; of a short one, nothing."""

    def __init__(self, rows: int) -> None:
        self._rows, self._done, self._said = rows, 0, time.monotonic()

    def __call__(self, rows: int) -> None:
        """So many more are done."""
        self._done += rows
        if time.monotonic() - self._said >= EVERY_S:
            self._said = time.monotonic()
            log(INFO, "Scored %s of %s rows", f"{self._done:,}", f"{self._rows:,}")
