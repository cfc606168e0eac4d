"""The order in which rows are visited. Nothing here reads a row."""

from collections.abc import Iterator

import numpy as np


def batches(count: int, batch_size: int, seed: tuple[int, ...]) -> Iterator[list[int]]:
    """Shuffled row numbers of one pass over `count` rows; the last batch may be smaller.

    The order depends on `seed` alone, and no other random state is read or changed.
    """
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).permutation(count)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size].tolist()
