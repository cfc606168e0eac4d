"""Our attention equals PyTorch's MATH kernel, along one direction and several, within the memory it is given."""

import math

import pytest
import torch
import torch.nn.functional as F
from derivatives import DIRECTIONS, EXACT, alone, assert_like_pytorch, noise, shared, subsets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spry_app.autodiff.memory import MIB, peak_mib
from spry_app.autodiff.workspace import DEFAULT_BYTES, workspace

attend = F.scaled_dot_product_attention


def qkv(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: noise(*shape, seed=at, dtype=dtype) for at, name in enumerate(("query", "key", "value"))}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_attention_equals_the_math_kernel(data: st.DataObject) -> None:
    """Any shape, mask, sharing of key heads, set of moving tensors, and limit of memory."""
    batch, heads, group = (data.draw(st.integers(1, 3), name) for name in ("batch", "key heads", "sharing"))
    rows, keys, width = (data.draw(st.integers(1, 7), name) for name in ("rows", "keys", "width"))
    kind = data.draw(st.sampled_from(["none", "bool", "by head", "padding", "additive", "one row", "causal"]))
    moving = data.draw(st.sampled_from(subsets("query key value")))
    scale = data.draw(st.sampled_from([None, 0.3]))
    limit = data.draw(st.sampled_from([1, 200, 1000, DEFAULT_BYTES]))
    mask = {
        "bool": noise(1, 1, rows, keys, seed=4) > 0.3,
        "by head": noise(batch, heads * group, rows, keys, seed=4) > 0.3,
        "padding": (torch.arange(keys) < 1 + torch.arange(batch)[:, None])[:, None, None, :],
        "additive": noise(batch, heads * group, rows, keys, seed=5).masked_fill(noise(rows, keys) > 1, -torch.inf),
        "one row": noise(1, keys, seed=6),
    }.get(kind)
    tensors = {
        "query": noise(batch, heads * group, rows, width),
        "key": noise(batch, heads, keys, width, seed=1),
        "value": noise(batch, heads, keys, width + 1, seed=2),
    }
    options = {"attn_mask": mask, "is_causal": kind == "causal", "scale": scale, "enable_gqa": group > 1}
    with workspace(limit):
        assert_like_pytorch(lambda **given: attend(**given, **options), tensors, moving)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 2, 3, 5, 4)], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_any_number_of_leading_axes(shape: tuple[int, ...], masked: bool) -> None:
    mask = noise(*shape[:-2], 5, 5, seed=9) > -1 if masked else None
    assert_like_pytorch(lambda **given: attend(**given, attn_mask=mask), qkv(*shape), ("query", "key", "value"))


def test_causal_attention_in_blocks_of_rows_leaves_out_nothing_that_is_seen() -> None:
    """Long enough that blocks are cut for it."""
    for keys in (100, 300):
        tensors = {"query": noise(1, 2, 300, 2), "key": noise(1, 2, keys, 2), "value": noise(1, 2, keys, 2, seed=2)}
        assert_like_pytorch(lambda **given: attend(**given, is_causal=True), tensors, ("query", "key", "value"))


LIMIT = 2**15


@pytest.mark.parametrize(
    ("shape", "limit", "at_once"),
    [
        ((1, 1, 256, 2), LIMIT, 1),
        ((1, 16, 64, 2), LIMIT, DIRECTIONS),
        ((16, 1, 64, 2), LIMIT, DIRECTIONS),
        ((1, 1, 256, 2), 2**20, 1),
    ],
    ids=["rows", "heads", "examples", "no limit"],
)
def test_scores_and_one_tangent_of_them_stay_within_the_limit(shape: tuple[int, ...], limit: int, at_once: int) -> None:
    """However many directions; all scores take 256 KiB, and each of their tangents as much."""
    tensors = qkv(*shape, dtype=torch.float32)
    all_of_them = 256 * 1024 / MIB
    own = math.prod(shape) * 4 / MIB

    def run() -> object:
        return (
            shared(attend, tensors, ["query", "value"])
            if at_once > 1
            else alone(attend, tensors, ["query", "value"], True)
        )

    with workspace(limit):
        peak = peak_mib(run, "cpu")
    # Apart from scores: tangents as drawn and as stacked, the result, and a copy of each operand of a block.
    rest = own * (4 * at_once + 1 + 5)
    assert peak < limit / MIB + rest < 2 * all_of_them or (limit > LIMIT and peak > 2 * all_of_them)


def test_a_row_that_sees_no_key_is_zero_and_spoils_nothing() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    for hidden in (mask, torch.zeros(2, 2).masked_fill(~mask, -torch.inf)):
        value, tangent = alone(
            lambda m=hidden, **given: attend(**given, attn_mask=m), qkv(1, 1, 2, 3), ["query", "value"], True
        )
        assert tangent is not None
        assert value[0, 0, 1].eq(0).all() and tangent[0, 0, 1].eq(0).all()
        assert value[0, 0, 0].ne(0).all() and tangent.isfinite().all()
        _, together = shared(
            lambda m=hidden, **given: attend(**given, attn_mask=m), qkv(1, 1, 2, 3), ["query", "value"]
        )
        assert together[:, 0, 0, 1].eq(0).all() and together.isfinite().all()


def test_dropout_drops_value_and_tangents_alike() -> None:
    """With one-hot values the output is the weights themselves: what is kept is scaled by 1 / (1 - p), in all."""
    tensors = qkv(1, 1, 40, 3) | {
        "key": noise(1, 1, 50, 3, seed=1),
        "value": torch.eye(50, dtype=torch.float64)[None, None],
    }
    plain, plain_t = shared(attend, tensors, ["query", "key"])
    dropped, dropped_t = shared(lambda **given: attend(**given, dropout_p=0.25), tensors, ["query", "key"])
    kept = dropped != 0
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    torch.testing.assert_close(dropped, torch.where(kept, plain / 0.75, 0.0), **EXACT)
    torch.testing.assert_close(dropped_t, torch.where(kept, plain_t / 0.75, 0.0), **EXACT)


def test_a_half_format_computes_in_fp32() -> None:
    """As far off the MATH kernel, which computes in fp32 too, as one rounding of the result."""
    tensors = qkv(1, 2, 9, 8, dtype=torch.bfloat16)
    ours, theirs = (alone(attend, tensors, list(tensors), rules) for rules in (True, False))
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)


def test_a_mask_that_moves_is_not_forgotten() -> None:
    tensors = qkv(1, 2, 3, 4) | {"attn_mask": noise(1, 2, 3, 3, seed=7)}
    assert_like_pytorch(attend, tensors, ["attn_mask"])
    assert_like_pytorch(attend, tensors, ["query", "attn_mask"])


def test_a_mask_together_with_causal_is_refused_as_pytorch_does() -> None:
    mask = torch.ones(2, 2).bool()
    with pytest.raises(RuntimeError, match="is_causal"):
        alone(lambda **given: attend(**given, attn_mask=mask, is_causal=True), qkv(1, 1, 2, 2), ["query"], rules=True)
