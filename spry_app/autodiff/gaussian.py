"""Random words -> standard normal numbers, the same bits on every machine. What they are for is decided elsewhere.

PyTorch's own generators are not used: their normals differ between CPU and CUDA, between GPUs with different numbers of
multiprocessors (pytorch issues 196613, 79496), and on the CPU below 16 elements. Philox words are exact everywhere; the
way from words to normals below uses only operations that IEEE 754 rounds correctly, one numpy call each, so that no
compiler can fuse two of them and no platform's `log` or `cos` is asked.
"""

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

CHUNK = 1 << 16
"""Normals made at once: the float64 work space stays in the cache."""

# Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37 (1988), PPND7:
# quotients of polynomials (lowest power first) in 0.180625 - q^2 around the median, in sqrt(-log tail) outside of it.
# Its relative error of 1e-7 is one unit in the last place of fp32.
CENTRE = (
    (3.3871327179, 50.434271938, 159.29113202, 59.109374720),
    (1.0, 17.895169469, 78.757757664, 67.187563600),
)
TAIL = (
    (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103),
    (1.0, 0.73700164250, 0.12021132975),
)
FAR_TAIL = (
    (6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997),
    (1.0, 0.24197894225, 0.012258202635),
)
LOG_2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476


def normals(generator: np.random.Philox, count: int) -> Singles:
    """The next `count` of them, fp32."""
    drawn = np.empty(count, np.float32)
    for start in range(0, count, CHUNK):
        part = drawn[start : start + CHUNK]
        part[:] = _words_to_normals(generator.random_raw(part.size))
    return drawn


def _words_to_normals(words: npt.NDArray[np.uint64]) -> Doubles:
    """Invert the normal distribution at the middle of one of 2^52 equal cells of (0, 1)."""
    q = np.right_shift(words, np.uint64(12)).astype(np.float64)
    np.add(q, 0.5 - 2.0**51, out=q)
    np.multiply(q, 2.0**-52, out=q)
    z = np.subtract(0.180625, np.multiply(q, q))
    z = np.multiply(q, _quotient(CENTRE, z))
    outside = np.flatnonzero(np.abs(q) > 0.425)
    side = q[outside]
    root = np.sqrt(np.negative(_log(np.subtract(0.5, np.abs(side)))))
    far = root > 5.0
    tail = _quotient(TAIL, np.subtract(root, 1.6))
    tail[far] = _quotient(FAR_TAIL, np.subtract(root[far], 5.0))
    z[outside] = np.copysign(tail, side)
    return z


def _quotient(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Doubles) -> Doubles:
    above, below = (_polynomial(c, x) for c in coefficients)
    return np.divide(above, below, out=above)


def _polynomial(coefficients: tuple[float, ...], x: Doubles) -> Doubles:
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        np.multiply(value, x, out=value)
        np.add(value, coefficient, out=value)
    return value


def _log(x: Doubles) -> Doubles:
    """Natural logarithm for x > 0: x = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1))."""
    m, e = np.frexp(x)
    low = m < SQRT_HALF
    m = np.where(low, np.multiply(m, 2.0), m)
    e = np.subtract(e, low).astype(np.float64)
    t = np.divide(np.subtract(m, 1.0), np.add(m, 1.0))
    series = _polynomial(tuple(2.0 / n for n in range(1, 21, 2)), np.multiply(t, t))
    return np.add(np.multiply(e, LOG_2), np.multiply(t, series))
