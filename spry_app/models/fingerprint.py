"""A name for frozen base weights that all nodes with the same ones agree on; nothing here judges a difference."""

import hashlib
import json
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SHAPE_OF_THE_MODEL = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "hidden_act",
)
_SAMPLE = 4096


class Difference(NamedTuple):
    """what: the base model, or else the fixed part of the adapter. here, there: beginnings of their fingerprints."""

    what: str
    here: str
    there: str


def fingerprint(model: PreTrainedModel, head: Collection[str]) -> str:
    """sha256 over the base model's configuration and its floating-point weights, the modules in `head` left out.

    Equal for equal weights whatever the device. Values are compared as bfloat16, so a float32 and a bfloat16 copy
    agree, and differences below that are not seen. Of a tensor above 8192 values about 4096 are read, evenly spread,
    and the last 64: a few altered numbers in a large matrix can go unnoticed. Quantised weights are not read (two
    devices may round them differently), only norms, biases and embeddings beside them; a quantised model therefore
    has another fingerprint than the same model in full, and the same for nf4, fp4 and int8. It finds a wrong
    checkpoint or revision; it is no defence against someone who wants to be mistaken for another.
    """
    config = {key: getattr(model.config, key, None) for key in _SHAPE_OF_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.named_parameters()):
        if tensor.is_floating_point() and name.split(".")[0] not in head:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(_sample(tensor.detach()))
    return digest.hexdigest()


def with_fixed(base: str, digest: str) -> str:
    """The fingerprint of base weights and of what an adapter is made of beside them and nobody trains."""
    return f"{base}+{digest}"


def difference(here: str, there: str) -> Difference | None:
    """Between two fingerprints; None if they are equal."""
    names = "base model", "fixed part of the adapter"
    for what, one, other in zip(names, _halves(here), _halves(there), strict=True):
        if one != other:
            return Difference(what, one[:12] or "none", other[:12] or "none")
    return None


def _halves(identity: str) -> tuple[str, str]:
    base, _, fixed = identity.partition("+")
    return base, fixed


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    if flat.numel() > 2 * _SAMPLE:
        # An odd stride walks through all columns of a matrix whose width is even.
        stride = (flat.numel() // _SAMPLE) | 1
        flat = torch.cat([flat[::stride], flat[-64:]])
    return flat.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
