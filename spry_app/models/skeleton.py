"""A model of a checkpoint's shapes and formats without its weights: on "meta", or filled at random. Nothing is
downloaded here but a configuration, and nothing that a run trains on is made.
"""

import importlib
from typing import Any, cast

import torch
from accelerate import init_empty_weights  # comes with PEFT
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer

from spry_app.config import AdapterConfig, ModelConfig
from spry_app.models import checkpoint
from spry_app.models.adapted import AdaptedModel
from spry_app.models.adapter import attach
from spry_app.models.loading import ready
from spry_app.models.randomness import seeded
from spry_app.models.sources import find
from spry_app.models.subspace import install_subspace
from spry_app.tasks import LearningTask

BLOCK = 64
"""Weights that share a scale in 4 bits."""
META = torch.device("meta")


def skeleton(
    model: ModelConfig,
    adapter: AdapterConfig,
    task: LearningTask,
    num_labels: int,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device = META,
    layers: int = 0,
) -> AdaptedModel:
    """As `load_model`, from the configuration alone: a folder with config.json, a Hub name, an embedded checkpoint.

    device: "meta" for no data at all; on another one the weights are random. layers: so many blocks of the model alone;
    0 for all. tokenizer: to stand in for the checkpoint's, which is not asked for. Raises SpryError where there is no
    such model, quantiser or target.
    """
    location = find(model.name)
    quantizer = checkpoint.quantizer_of(model)
    with checkpoint.quiet(), checkpoint.explained(model, task, location):
        settings, _ = checkpoint.settings_of(model, task, location, num_labels)
        settings.pad_token_id, settings.use_cache = settings.pad_token_id or 0, False
        if layers:
            _cut(settings, layers)
        with init_empty_weights():
            base: PreTrainedModel = task.auto_model.from_config(settings, dtype=checkpoint.DTYPES[model.dtype])
        head = checkpoint.head_of(base, task)
    base.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    if quantizer is not None:
        _quantise(base, head, quantizer, device)
    fill(base, device)
    with seeded(0, device):
        adapted = attach(base, adapter, head, model.name, model.revision, task.peft_type)
    # A frame of singular vectors has the shapes of a random one.
    subspace = install_subspace(adapted, adapter.model_copy(update={"frame": "random"}), 0)
    adapted.to(device)
    return ready(adapted, tokenizer, "", device, subspace)


def fill(model: nn.Module, device: torch.device) -> None:
    """Move it to `device`, with random numbers for weights without data; buffers keep their values."""
    draw = torch.Generator(device if device.type != "meta" else "cpu").manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and device.type != "meta":
                value = torch.empty_like(parameter, device=device)
                setattr(module, name, nn.Parameter(_drawn(value, name, draw), requires_grad=False))
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    model.to(device)


def _drawn(value: Tensor, name: str, draw: torch.Generator) -> Tensor:
    if value.dim() < 2:
        return value.fill_(1.0 if name == "weight" else 0.0)
    return value.normal_(0.0, 0.02, generator=draw)


def weights_bytes(model: nn.Module) -> int:
    """Of all that is in memory for as long as the model is: parameters, buffers, scales of quantised weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        tensors += [] if state is None else [state.absmax, state.code]
        tensors += [] if scales is None else [scales]
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _cut(settings: PreTrainedConfig, layers: int) -> None:
    settings.num_hidden_layers = layers
    kinds = getattr(settings, "layer_types", None)
    if kinds:
        settings.layer_types = kinds[:layers]


def _quantise(model: PreTrainedModel, head: tuple[str, ...], config: BitsAndBytesConfig, device: torch.device) -> None:
    """Put bitsandbytes' layers where transformers would, around packed weights of random bytes."""
    from bitsandbytes.nn.modules import Linear4bit

    if head:
        config.llm_int8_skip_modules = list(head)
    quantizer: Any = AutoHfQuantizer.from_config(config)
    quantizer.preprocess_model(model, device_map={"": device})
    quantizer.postprocess_model(model)
    for module in model.modules():
        if hasattr(module, "source_cls"):
            (_in_4_bits if isinstance(module, Linear4bit) else _in_8_bits)(module, device)
    importlib.import_module("spry_app.models.quantized").pass_tangents(model)


def _in_4_bits(layer: Any, device: torch.device) -> None:
    packed = torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8, device=device).random_(0, 256)
    absmax = torch.empty(-(-layer.weight.numel() // BLOCK), device=device).uniform_(0.02, 0.06)
    layer.weight = packed_4_bit(packed, absmax, layer.weight.shape, layer.weight.quant_type, layer.compute_dtype)


def packed_4_bit(packed: Tensor, absmax: Tensor, shape: torch.Size, kind: str, dtype: torch.dtype) -> nn.Parameter:
    """The weight of a layer of bitsandbytes around bytes (n / 2, 1) and scales (n / BLOCK,)."""
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn.modules import Params4bit

    code = get_4bit_type(kind, device=packed.device)  # type: ignore[no-untyped-call]
    state = QuantState(absmax, shape, code, BLOCK, kind, dtype)  # type: ignore[no-untyped-call]
    options: Any = {"quant_state": state, "quant_type": kind, "bnb_quantized": True}
    return cast(nn.Parameter, Params4bit(packed, requires_grad=False, compress_statistics=False, **options))


def _in_8_bits(layer: Any, device: torch.device) -> None:
    from bitsandbytes.nn.modules import Int8Params

    rows, columns = layer.weight.shape
    values = torch.empty(rows, columns, dtype=torch.int8, device=device).random_(-127, 128)
    scales = torch.empty(rows, device=device).uniform_(0.02, 0.06)
    layer.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
