"""A loaded model with its adapter: read, replace and save what is trained. Losses and gradients live elsewhere."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spry_app.autodiff.token_loss import IGNORED, token_loss
from spry_app.autodiff.transfer import onto
from spry_app.config import AdapterConfig, ModelConfig
from spry_app.models.adapter import attach
from spry_app.models.blocks import Entering, NoPrefixError, depth_of, install, run_until, starting_from
from spry_app.models.checkpoint import Checkpoint, find_device, load_checkpoint
from spry_app.models.fingerprint import fingerprint, with_fixed
from spry_app.models.prompts import check_prompt, has_prompt
from spry_app.models.randomness import seeded
from spry_app.models.sources import public_name
from spry_app.models.subspace import Fixed, Subspace, install_subspace
from spry_app.models.units import HEAD, Units, group

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class AdaptedModel:
    """A model in eval mode whose own parameters never ask for gradients: derivatives flow through `logits(params)`."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    units: Units
    """Unit name -> names of its trainable tensors; by depth, "head" last."""
    fingerprint: str
    device: torch.device
    blocks: tuple[str, ...] = ()
    """Names of the transformer blocks, from the lowest; () where they are not to be found (blocks.install)."""
    subspace: Subspace = field(default_factory=Subspace)

    def tensors(self) -> Tensors:
        """Every trainable tensor, fp32 copies on the CPU."""
        return {
            name: self.model.get_parameter(name).detach().to("cpu", torch.float32, copy=True)
            for names in self.units.values()
            for name in names
        }

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Write them into the model; names not given stay as they are. Shapes must be the model's."""
        for name, tensor in {**tensors, **self._placed(tensors)}.items():
            parameter = self.model.get_parameter(name)
            assert parameter.shape == tensor.shape, f"{name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
            parameter.copy_(tensor)

    def logits(
        self,
        params: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        dropout: int | None = None,
        entering: Entering | None = None,
    ) -> Tensor:
        """Shape (batch, labels), fp32, with `params` in place of the parameters of those names.

        Duals and gradients pass through. `dropout` seeds LoRA's dropout masks, so that equal seeds give one
        deterministic function to differentiate; None leaves dropout out. `entering`: the pass begins there (`prefix`).
        """
        return self._output(self._placed(params), inputs, dropout, entering).float()

    def next_token_loss(
        self,
        params: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        dropout: int | None = None,
        entering: Entering | None = None,
    ) -> Tensor:
        """Of a causal language model: mean over the labels (batch, length) but the first, -100 left out; see `logits`.

        Logits exist for a few tokens at a time (token_loss). Raises NotImplementedError for a model that changes its
        logits after its head.
        """
        base = cast(PreTrainedModel, self.model.get_base_model())
        changes = [key for key in _LOGIT_CHANGES if getattr(base.config, key, None) not in (None, 1, 1.0)]
        if changes:
            raise NotImplementedError(f"a {base.config.model_type} model changes its logits by {', '.join(changes)}")
        head: nn.Module = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        placed = self._placed(params)
        name = next(name for name, part in self.model.named_modules() if part is head)
        own = {key.removeprefix(f"{name}."): value for key, value in placed.items() if key.startswith(f"{name}.")}
        with _passing_through(head):
            hidden = self._output(placed, inputs, dropout, entering)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # cheaper than hidden states cut short, and so copied
        return token_loss(
            hidden,
            lambda rows: functional_call(head, own, (rows,)),
            onto(following, self.device),
            base.config.vocab_size,
        )

    def _placed(self, params: Mapping[str, Tensor]) -> Tensors:
        own = {name: self.model.get_parameter(name) for name in params}
        return self.subspace.expand(
            {name: onto(tensor, own[name].device, own[name].dtype) for name, tensor in params.items()}
        )

    def _output(
        self, placed: Tensors, inputs: Mapping[str, Tensor], dropout: int | None, entering: Entering | None
    ) -> Tensor:
        with self._dropout(dropout), starting_from(entering):
            logits: Tensor = functional_call(self.model, placed, kwargs=self._batch(inputs), tie_weights=False).logits
        return logits

    @torch.no_grad()
    def prefix(
        self,
        inputs: Mapping[str, Tensor],
        depth: int,
        params: Mapping[str, Tensor] | None = None,
        dropout: int | None = None,
        entering: Entering | None = None,
    ) -> Entering:
        """What enters block `depth`, or a block above it where `entering` is; see `logits`. Raises NoPrefixError."""
        if has_prompt(self.model):
            raise NoPrefixError("virtual tokens stand before a text")
        if entering is not None and entering.depth >= depth:
            return entering
        placed, batch = self._placed(params or {}), self._batch(inputs)

        def run() -> None:
            functional_call(self.model, placed, kwargs=batch, tie_weights=False)

        with self._dropout(dropout):
            return Entering(depth, run_until(depth, run, entering))

    def depths(self) -> dict[str, int]:
        """Trainable tensor -> its block; the number of blocks for the head and what else follows them all."""
        found, passed = dict[str, int](), 0
        for unit, names in self.units.items():
            for name in names:
                inside = any(moved.startswith(f"{block}.") for block in self.blocks for moved in self._moved(name))
                passed = len(self.blocks) if inside or unit == HEAD else passed
                found[name] = self._depth_of(name) if inside else passed
        return found

    def depth(self, names: Iterable[str]) -> int:
        """The lowest block with one of these tensors; the number of blocks if they are all the head's."""
        head = set(self.units.get(HEAD, ()))
        depths = [self._depth_of(name) for name in names if name not in head]
        return min(depths, default=len(self.blocks))

    def _moved(self, name: str) -> tuple[str, ...]:
        return self.subspace.moves.get(name, (name,))

    def _depth_of(self, name: str) -> int:
        """Of the lowest tensor that moves with this one."""
        return min(depth_of(moved, self.blocks) for moved in self._moved(name))

    def _batch(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: onto(tensor, self.device) for name, tensor in inputs.items() if name != "labels"}

    @contextmanager
    def _dropout(self, seed: int | None) -> Iterator[None]:
        if seed is None:
            yield
            return
        layers: list[Any] = [module.lora_dropout for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.train()
        try:
            with seeded(seed, self.device):
                yield
        finally:
            for layer in layers:
                layer.eval()


_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What configurations call a change of the logits after the head."""


@contextmanager
def _passing_through(head: nn.Module) -> Iterator[None]:
    """Inside it, `head` returns what it is given."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward  # the instance's; that of its class is back


def load_model(
    model: ModelConfig, adapter: AdapterConfig, num_labels: int, seed: int, path: str = "", frame: Fixed | None = None
) -> AdaptedModel:
    """Load, quantise, adapt. `path` is a node's own copy, taken instead of model.name.

    frame: what is not computed here of a subspace of the adapter, but given (Subspace.sent).
    Whatever the checkpoint lacks and LoRA's first factors are drawn from `seed` alone, the same on every node.
    Raises SpryError for a model, device, quantiser or target that is not to be had.
    """
    device = find_device(model.device)
    with seeded(seed, device):
        base = load_checkpoint(model, num_labels, device, path)
        identity = fingerprint(base.model, base.head)
        adapted = attach(base.model, adapter, base.head, public_name(model.name), model.revision)
    subspace = install_subspace(adapted, adapter, seed, frame)
    if subspace.fixed is not None:
        identity = with_fixed(identity, subspace.fixed.digest)
    adapted.eval()
    if has_prompt(adapted):
        check_prompt(adapted, base.tokenizer, adapter.kind)
    units = group(adapted)
    # A parameter that asks for gradients makes backprop keep the graph of units that this node does not train.
    adapted.requires_grad_(False)
    return AdaptedModel(adapted, base.tokenizer, units, identity, device, install(adapted), subspace)


def load_base(model: ModelConfig, num_labels: int, seed: int, path: str = "") -> Checkpoint:
    """The model without an adapter; where the checkpoint lacks weights, with the random ones of `load_model`."""
    device = find_device(model.device)
    with seeded(seed, device):
        return load_checkpoint(model, num_labels, device, path)


def save_adapter(adapted: AdaptedModel, tensors: Mapping[str, Tensor], folder: Path, whole: bool = True) -> None:
    """Write `tensors` into the model, then adapter and tokenizer into `folder` for `peft.PeftModel.from_pretrained`.

    whole: False for the adapter's weights alone, beside files that are there already; a tenth of the time.
    """
    adapted.load_tensors(tensors)
    plain = adapted.subspace.plain()
    if not whole:
        # "auto" would ask the Hub whether the vocabulary of the base model has grown.
        own = get_peft_model_state_dict(adapted.model, state_dict=plain, save_embedding_layers=False)
        folder.mkdir(exist_ok=True)
        save_file({name: t.detach().cpu().clone() for name, t in own.items()}, folder / WEIGHTS, {"format": "pt"})
        return
    adapted.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=plain)
    adapted.tokenizer.save_pretrained(str(folder))
