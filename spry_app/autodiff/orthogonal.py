"""Seeded orthogonal frames: as many orthogonal directions as there are dimensions, the same bits on every machine.
Who takes which of them is decided elsewhere.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from spry_app.autodiff.gaussian import Singles
from spry_app.autodiff.random_words import generator


class Frame:
    """d orthogonal columns of length sqrt(d), in d dimensions, from a seed.

    The frame is sqrt(d) times a product of orthogonal matrices: two Walsh-Hadamard transforms over n values, n the
    largest power of two up to d, of which one takes the first n of the d and one the last, and random signs after each.
    Its columns begin at a random one, so that whichever is taken E[v v^T] = I. The mean of slope * column over K of
    them is an unbiased estimate of a gradient with the relative squared error (d - K) / K, where Gaussian directions
    have (d + 1) / K.

    A sum of any number of columns takes 2 d log2(d) additions; numpy does them one rounded operation at a time.
    """

    def __init__(self, coordinates: str, dimension: int) -> None:
        words = generator(coordinates, b"spry frame")
        self.dimension = dimension
        self._first = int(words.random_raw() % np.uint64(dimension))
        self._signs = [signs(words, dimension) for _ in range(2)]

    def columns(self, weights: Mapping[int, float]) -> Singles:
        """Sum of weight * column, shape (d,). Numbers of columns count on from d as from 0 again."""
        d = self.dimension
        values = np.zeros(d, np.float32)
        for number, weight in weights.items():
            values[(self._first + number) % d] += np.float32(weight)
        n = 1 << (d.bit_length() - 1)
        for part, turned in zip((slice(0, n), slice(d - n, d)), self._signs, strict=True):
            values[part] = _walsh_hadamard(values[part])
            values *= turned
        return np.multiply(values, np.float32(math.sqrt(d)), out=values)


def signs(words: np.random.Philox, count: int) -> npt.NDArray[np.int8]:
    """The next `count` of them, +1 or -1."""
    bits = np.unpackbits(words.random_raw(-(-count // 64)).astype("<u8").view(np.uint8), count=count)
    return np.subtract(1, np.multiply(bits, np.int8(2), dtype=np.int8), dtype=np.int8)


def _walsh_hadamard(values: Singles) -> Singles:
    """Orthogonal; the length must be a power of two."""
    count, half = len(values), 1
    while half < count:
        pairs = values.reshape(-1, 2, half)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        half *= 2
    return np.multiply(values.reshape(count), np.float32(math.sqrt(1 / count)))
