"""The loss of a language model in chunks of tokens equals that over all logits, whatever is differentiated and how."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.memory import peak_mib
from spry_app.autodiff.slopes import Part, central_difference, forward_mode
from spry_app.autodiff.token_loss import IGNORED, token_loss
from spry_app.autodiff.workspace import workspace

WIDTH, WORDS = 8, 50
SEED = Seed(0, 0, 0, 0)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def targets() -> Tensor:
    wanted = torch.randint(WORDS, (3, 7), generator=torch.Generator().manual_seed(1))
    wanted[0, :4] = wanted[2, 6] = IGNORED
    return wanted


POINT = {"input": draw(3, 7, WIDTH), "below": draw(WIDTH, WIDTH, seed=1), "head": draw(WORDS, WIDTH, seed=2)}


def chunked(params: Tensors, targets: Tensor) -> Tensor:
    with workspace(4 * WORDS * 4):  # four tokens a chunk
        hidden = F.linear(params["input"], params["below"]).tanh()
        return token_loss(hidden, lambda rows: F.linear(rows, params["head"]), targets, WORDS)


def whole(params: Tensors, targets: Tensor) -> Tensor:
    logits = torch.tanh(params["input"] @ params["below"].T) @ params["head"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def gradient_of_the_whole(targets: Tensor) -> Tensors:
    leaves = {name: value.clone().requires_grad_() for name, value in POINT.items()}
    grads = torch.autograd.grad(whole(leaves, targets), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("moving", [("below",), ("head",), ("below", "head"), ("input", "below", "head")])
@pytest.mark.parametrize("at_once", [1, 3])
def test_slopes_of_hidden_states_and_head_equal_those_of_backprop(
    targets: Tensor, moving: tuple[str, ...], at_once: int
) -> None:
    own = {name: POINT[name] for name in moving}
    directions = [direction(SEED, k, own) for k in range(3)]
    part = Part(lambda params: chunked(POINT | params, targets), 1.0)
    loss, slopes = forward_mode([part], own, directions, at_once)
    truth = gradient_of_the_whole(targets)
    assert loss == pytest.approx(whole(POINT, targets).item(), rel=1e-12)
    for v, slope in zip(directions, slopes, strict=True):
        assert slope == pytest.approx(sum((truth[n] * v[n]).sum().item() for n in own), rel=1e-10)
    assert slopes == pytest.approx(central_difference(1e-5)([part], own, directions)[1], rel=1e-5)


def test_backprop_through_the_chunks_gives_the_same_gradient(targets: Tensor) -> None:
    found = GRADIENTS["backprop"].estimate([Part(lambda p: chunked(p, targets), 1.0)], POINT, SEED, 1, 1).gradient
    for name, expected in gradient_of_the_whole(targets).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-8)


def test_slices_weighted_by_their_tokens_add_up_to_the_batch(targets: Tensor) -> None:
    counts = (targets != IGNORED).sum(-1)
    own = {"below": POINT["below"]}
    v = [direction(SEED, 0, own)]

    def part(row: int) -> Part:
        def objective(params: Tensors) -> Tensor:
            return chunked(POINT | params | {"input": POINT["input"][row : row + 1]}, targets[row : row + 1])

        return Part(objective, (counts[row] / counts.sum()).item())

    sliced = forward_mode([part(row) for row in range(3)], own, v)
    batch = forward_mode([Part(lambda params: chunked(POINT | params, targets), 1.0)], own, v)
    assert sliced[0] == pytest.approx(batch[0], rel=1e-6)
    assert sliced[1] == pytest.approx(batch[1], rel=1e-6)


def test_where_nothing_counts_the_loss_and_its_slope_are_zero() -> None:
    own = {"below": POINT["below"]}
    nothing = torch.full((3, 7), IGNORED)
    part = Part(lambda params: chunked(POINT | params, nothing), 1.0)
    assert forward_mode([part], own, [direction(SEED, 0, own)]) == (0.0, [0.0])


def test_half_formats_have_their_loss_in_full_precision(targets: Tensor) -> None:
    hidden, weight = (draw(*shape, dtype=torch.bfloat16) for shape in ((3, 7, WIDTH), (WORDS, WIDTH)))
    loss = token_loss(hidden, lambda rows: F.linear(rows, weight), targets, WORDS)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy((hidden.double() @ weight.double().T).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert loss.item() != loss.bfloat16().item()


@pytest.mark.parametrize("name", ["forward-mode", "backprop"])
def test_memory_is_that_of_a_chunk_and_not_of_all_logits(name: str) -> None:
    words, tokens = 4000, 512
    point = {"head": draw(words, WIDTH, dtype=torch.float32)}
    hidden, wanted = draw(tokens, WIDTH, dtype=torch.float32), torch.zeros(tokens, dtype=torch.long)

    def step(limit: int) -> float:
        def objective(params: Tensors) -> Tensor:
            return token_loss(hidden, lambda rows: F.linear(rows, params["head"]), wanted, words)

        with workspace(limit):
            return peak_mib(lambda: GRADIENTS[name].estimate([Part(objective, 1.0)], point, SEED, 1, 1), "cpu")

    all_logits = tokens * words * 4
    assert step(all_logits) > 2 * all_logits / 2**20
    assert step(all_logits // 32) < 0.25 * all_logits / 2**20


@pytest.mark.parametrize("directions", [1, 3])
def test_a_chunk_takes_its_logits_their_tangents_and_the_weights_of_the_words(directions: int) -> None:
    """Tensors of the size of its logits: 2 + K, where PyTorch's own rule takes up to four for each direction."""
    words, tokens = 4000, 512
    own = {"below": draw(WIDTH, WIDTH, dtype=torch.float32)}
    hidden, head = draw(tokens, WIDTH, dtype=torch.float32), draw(words, WIDTH, dtype=torch.float32)
    wanted = torch.zeros(tokens, dtype=torch.long)
    chunk = 64 * words * 4

    def objective(params: Tensors) -> Tensor:
        return token_loss(F.linear(hidden, params["below"]), lambda rows: F.linear(rows, head), wanted, words)

    moves = [direction(SEED, k, own) for k in range(directions)]
    with workspace(chunk):
        peak = peak_mib(lambda: forward_mode([Part(objective, 1.0)], own, moves, directions), "cpu")
    assert peak < (2.3 + directions) * chunk / 2**20
