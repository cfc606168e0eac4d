"""Softmax and norms, and their tangents along one direction or several. Nothing here intercepts anything.

The Jacobians of softmax, and of a norm without weights, are symmetric: the backward kernel, which makes a gradient of a
gradient, makes a tangent of a tangent.
"""

import torch
from torch import Tensor

from spry_app.autodiff.duals import wide
from spry_app.autodiff.fans import Fan, directions, fan, spread


def softmax(input: Fan, dim: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """p = softmax(x), dp = p (dx - sum(p dx))."""
    x, xt = input
    assert xt is not None
    p = torch.softmax(x, dim, dtype=dtype)
    return p, fan((torch._softmax_backward_data(t.to(p.dtype), p, dim, p.dtype) for t in xt), len(xt))


def layer_norm(input: Fan, weight: Fan, bias: Fan, shape: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """y = n w + b with n = (x - mean x) / std x; dn = (dx - mean dx - n mean(n dx)) / std x. In fp32 at least."""
    (x, xt), (w, wt), (b, bt) = input, weight, bias
    x_, w_, b_ = wide(x), *(None if t is None else wide(t) for t in (w, b))
    out, mean, inverse_std = torch.native_layer_norm(x_, shape, w_, b_, eps)
    if xt is None:
        tangent = out.new_zeros((directions(wt, bt), *out.shape))
    else:
        args = (x_, shape, mean, inverse_std, None, None, [True, False, False])
        tangent = fan((torch.ops.aten.native_layer_norm_backward(wide(t), *args)[0] for t in xt), len(xt))
        if w is not None:
            tangent.mul_(w)
    if wt is not None:
        normal = torch.native_layer_norm(x_, shape, None, None, eps)[0]
        tangent.add_(normal * spread(wt, out))
    if bt is not None:
        tangent.add_(spread(bt, out))
    return out.to(x.dtype), tangent.to(x.dtype)


def rms_norm(input: Fan, weight: Fan, shape: list[int], eps: float | None) -> tuple[Tensor, Tensor]:
    """y = n w with n = x / rms x; dn = (dx - n mean(n dx)) / rms x. In fp32 at least."""
    (x, xt), (w, wt) = input, weight
    x_ = wide(x)
    dims = tuple(range(-len(shape), 0))
    mean = x_.square().mean(dims, keepdim=True)
    inverse_rms = mean.add_(torch.finfo(x_.dtype).eps if eps is None else eps).rsqrt_()
    normal = x_ * inverse_rms
    if xt is None:
        tangent = x_.new_zeros((directions(wt), *x.shape))
    else:
        projection = (wide(xt) * normal).mean(dims, keepdim=True)
        tangent = torch.addcmul(wide(xt), normal, projection, value=-1).mul_(inverse_rms)
        if w is not None:
            tangent.mul_(w)
    if wt is not None:
        tangent.add_(normal * spread(wt, x))
    if w is not None:
        normal.mul_(w)
    return normal.to(x.dtype), tangent.to(x.dtype)
