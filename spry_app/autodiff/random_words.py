"""Coordinates -> random words by a counter-based generator, the same on every machine. What is made of them is not
decided here.
"""

from hashlib import blake2b

import numpy as np


def generator(coordinates: str, purpose: bytes) -> np.random.Philox:
    """Equal words for equal arguments, unrelated ones for others. purpose: 16 bytes at most."""
    digest = blake2b(coordinates.encode(), digest_size=16, person=purpose).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64))
