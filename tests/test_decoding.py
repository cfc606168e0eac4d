"""Arrays and slope logs made of any bytes and numbers: read whole, or refused before anything is allocated or run."""

import io
import math
import tracemalloc

import numpy as np
import pytest
import torch
from bad_messages import FORMATS, PAYLOADS, SHAPES, Touch, npy, object_array
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from spry_app.protocol import MalformedReply, Score, from_arrays, introduction_request, size_bytes, to_arrays
from spry_app.slope_log import unpack


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (1, 4, 1), (0, 7), (300, 2000)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8])
def test_what_numpy_saves_is_read_to_the_bit(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.arange(math.prod(shape)) % 251).reshape(shape).to(kind)
    found = from_arrays(to_arrays({"x": value, "transposed": value.T if value.dim() == 2 else value}))
    assert found["x"].dtype == kind
    assert torch.equal(found["x"], value)
    assert torch.equal(found["transposed"], value.T if value.dim() == 2 else value)


def test_no_pickle_is_run_though_it_would_be_by_who_allowed_it() -> None:

    with pytest.raises(MalformedReply, match="unreadable"):
        from_arrays(ArrayRecord({"x": Array("object", (1,), "numpy.ndarray", object_array())}))
    assert not Touch.called
    np.load(io.BytesIO(object_array()), allow_pickle=True)
    assert Touch.called
    Touch.called = False


@pytest.mark.parametrize(("shape", "kind"), [((2**40,), "float32"), ((2,), "\ud800")])
def test_what_could_not_have_come_over_a_wire_is_refused(shape: tuple[int, ...], kind: str) -> None:
    """Flower reads shape and dtype from JSON, where they may be what its protobuf cannot hold."""
    message = introduction_request(5, "f")
    message.content["arrays"] = ArrayRecord({"x": Array(kind, shape, "numpy.ndarray", b"x")})
    with pytest.raises(MalformedReply, match="cannot be serialised"):
        size_bytes(message)


@pytest.mark.parametrize(
    "score",
    [
        Score(1e300, {"correct": 1}, 2),
        Score(math.nan, {"correct": 1}, 2),
        Score(1.0, {"correct": 2**40}, 2**40),
        Score(1.0, {"correct": 0}, 0),
        Score(1.0, {"correct": 3}, 2),
        Score(1.0, {"correct": math.nan}, 2),
        Score(1.0, {"correct": -1}, 2),
    ],
)
def test_an_impossible_score_is_refused(score: Score) -> None:
    with pytest.raises(MalformedReply, match="an impossible score"):
        Score.from_message(score.to_message(introduction_request(5, "f")), {"correct": (0, 1)})


BOMBS = [npy(shape, kind, b"12345678") for shape in SHAPES for kind in FORMATS] + list(PAYLOADS)


@pytest.mark.parametrize("data", BOMBS, ids=range(len(BOMBS)))
def test_an_array_that_says_it_is_large_costs_nothing_and_a_pickle_is_never_run(data: bytes) -> None:
    """The archive holds 80 MB in 78 kB."""
    tracemalloc.start()
    try:
        arrays = from_arrays(ArrayRecord({"x": Array("float32", (2,), "numpy.ndarray", data)}))
    except MalformedReply:
        arrays = {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert not Touch.called
    assert all(value.nbytes <= len(data) for value in arrays.values())


@settings(max_examples=500, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200), tail=st.binary(max_size=40))
def test_any_bytes_are_an_array_or_refused(data: bytes, tail: bytes) -> None:
    for candidate in (data, npy("(2,)", "<f4", tail), b"\x93NUMPY\x01\x00" + data):
        try:
            (value,) = from_arrays(ArrayRecord({"x": Array("f", (2,), "numpy.ndarray", candidate)})).values()
        except MalformedReply:
            continue
        assert value.nbytes <= len(candidate)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.one_of(st.integers(0, 4), st.sampled_from([-1, 10**12, 2**63 - 1, 2**64, True, 1.5]))),
    slopes=st.lists(st.floats(), max_size=6),
)
def test_any_numbers_are_a_slope_log_or_a_value_error(counts: list, slopes: list[float]) -> None:
    try:
        assert isinstance(unpack(counts, slopes), tuple)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("counts", "slopes"),
    [
        ([1, 1, 0, 0, 1, 10**7, 0, 0], []),  # steps of nothing
        ([1, 1, 0, 0, 1, 10**6, 10**6, 0], [1.0]),
        ([1, 1, 0, 0, 1, 1, 1, 10**12], [1.0]),
        ([1, 10**12], []),
        ([-1, 0], []),
        ([True, 0], []),
        ([2**64, 0], []),
        ([1, 1, 0, 0, 1, 1, 1, 0], [math.nan]),
        ([1, 1, 0, 0, 1, 1, 1, 0], [-1e161]),  # infinite in single precision
        ([1, 1, 0, 0, 1, 1, 1, 0], ["1.0"]),
    ],
)
def test_a_log_that_says_it_is_long_costs_nothing(counts: list[int], slopes: list[float]) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match="slope log"):
        unpack(counts, slopes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
