"""Products and their tangents, along one direction or several: linear maps, matrix products, elementwise ones. Nothing
here intercepts anything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spry_app.autodiff.fans import Fan, directions, fan, spread


def linear(input: Fan, weight: Fan, bias: Fan) -> tuple[Tensor, Tensor]:
    """y = x w' + b, dy = dx w' + x dw' + db.

    Two products for a direction where the weight is frozen (PyTorch's own rule takes three), three where it is trained.
    """
    (x, xt), (w, wt), (b, bt) = input, weight, bias
    out = F.linear(x, w, b)
    tangent = out.new_zeros((directions(wt, bt), *out.shape)) if xt is None else F.linear(xt, w)
    if wt is not None:
        rows = x.reshape(-1, w.shape[1])
        for one, own in zip(tangent, wt, strict=True):
            one.view(-1, w.shape[0]).addmm_(rows, own.mT)
    if bt is not None:
        tangent.add_(spread(bt, out))
    return out, tangent


def transposed(weight: Fan) -> Fan:
    """Of a matrix."""
    w, wt = weight
    return w.mT, None if wt is None else wt.mT


def matmul(left: Fan, right: Fan) -> tuple[Tensor, Tensor]:
    """y = a b, dy = da b + a db."""
    (a, at), (b, bt) = left, right
    if bt is None and at is not None and b.dim() == 2 and a.dim() > 1:  # one product for all directions
        return a @ b, at @ b

    count = directions(at, bt)

    def along(k: int) -> Tensor:
        terms: list[Tensor] = [a @ bt[k]] if bt is not None else []
        if at is not None:
            terms.append(at[k] @ b)
        return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])

    return a @ b, fan(map(along, range(count)), count)


def multiply(left: Fan, right: Fan) -> tuple[Tensor, Tensor]:
    """y = a b, dy = da b + a db, elementwise; shapes and formats as in PyTorch."""
    (a, at), (b, bt) = left, right
    out = a * b
    if at is None:
        assert bt is not None
        return out, (a * spread(bt, out)).to(out.dtype)
    tangent = (spread(at, out) * b).to(out.dtype)
    if bt is not None and a.dtype == bt.dtype == out.dtype:
        tangent.addcmul_(a, spread(bt, out))
    elif bt is not None:
        tangent.add_(a * spread(bt, out))
    return out, tangent


def add(left: Fan, right: Fan, sign: int) -> tuple[Tensor, Tensor]:
    """y = a + sign b, where one of the two has no tangent; dy is a copy, for both may be changed in place."""
    (a, at), (b, bt) = left, right
    out = a + b if sign > 0 else a - b
    given = bt if at is None else at
    assert given is not None
    tangent = out.new_empty((len(given), *out.shape)).copy_(spread(given, out))
    return out, tangent.neg_() if at is None and sign < 0 else tangent


def divide(left: Fan, right: Fan) -> tuple[Tensor, Tensor]:
    """y = a / b, dy = da / b, where b has no tangent."""
    (a, at), (b, _) = left, right
    assert at is not None
    out = a / b
    return out, (spread(at, out) / b).to(out.dtype)


def square(input: Fan) -> tuple[Tensor, Tensor]:
    """y = x^2, dy = 2 x dx."""
    x, xt = input
    assert xt is not None
    return x * x, (xt * x).mul_(2)


def silu(input: Fan) -> tuple[Tensor, Tensor]:
    """y = x s(x), dy = s(x) (1 + x (1 - s(x))) dx, with s the logistic function; one kernel makes all tangents."""
    x, xt = input
    assert xt is not None
    return F.silu(x), torch.ops.aten.silu_backward(xt, x)
