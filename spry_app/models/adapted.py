"""A loaded model with its adapter: read, replace and save what is trained. Losses and gradients live elsewhere."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spry_app.autodiff.bisection import Chain
from spry_app.autodiff.token_loss import IGNORED, token_loss, token_scores
from spry_app.autodiff.transfer import onto
from spry_app.models.blocks import Entering, NoPrefixError, depth_of, run_until, starting_from
from spry_app.models.bound import Bound
from spry_app.models.pooling import averaging_block
from spry_app.models.prompts import has_prompt
from spry_app.models.randomness import seeded_by_block
from spry_app.models.subspace import Subspace
from spry_app.models.units import HEAD, Units
from spry_app.models.vocabulary import before_output_layer, logits_of

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

    @property
    def sees_mean(self) -> bool:
        """Whether its classifier sees the mean of all tokens, by a block of its own (models.pooling)."""
        return bool(averaging_block(cast(PreTrainedModel, self.model.get_base_model())))

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
        """Shape (batch, labels), fp32, with `params` in place of the parameters of those names; of a model that finds
        answers in a text, (batch, tokens, 2): where one begins, and where it ends.

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

        Logits exist for a few tokens at a time (token_loss).
        """
        placed = self._placed(params)
        return token_loss(*self._predicting(placed, inputs, labels, dropout, entering))

    def next_token_scores(
        self, inputs: Mapping[str, Tensor], labels: Tensor, entering: Entering | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of each token, and whether it is the likeliest, at the place of the token before it; see
        `next_token_loss` and token_scores.
        """
        return token_scores(*self._predicting({}, inputs, labels, None, entering))

    def _predicting(
        self,
        placed: Tensors,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        dropout: int | None,
        entering: Entering | None,
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor, int]:
        """Hidden states, the head, what each token is to predict, the size of the vocabulary."""
        hidden = self._features(placed, inputs, dropout, entering)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # cheaper than hidden states cut short, and so copied
        head = functools.partial(logits_of, self.model, placed)
        return hidden, head, onto(following, self.device), self.model.config.vocab_size

    def features(
        self, params: Mapping[str, Tensor], inputs: Mapping[str, Tensor], entering: Entering | None = None
    ) -> Tensor:
        """What comes to the output layer over the vocabulary, where the model has one, fp32; else its logits."""
        return self._features(self._placed(params), inputs, None, entering).float()

    def bound(
        self, params: Mapping[str, Tensor], dropout: int | None = None, entering: Entering | None = None
    ) -> Bound:
        """The model as a task sees it."""
        return Bound(self, params, dropout, entering)

    def _features(
        self, placed: Tensors, inputs: Mapping[str, Tensor], dropout: int | None, entering: Entering | None
    ) -> Tensor:
        return before_output_layer(self.model, lambda: self._output(placed, inputs, dropout, entering))

    def _placed(self, params: Mapping[str, Tensor]) -> Tensors:
        own = {name: self.model.get_parameter(name) for name in params}
        return self.subspace.expand(
            {name: onto(tensor, own[name].device, own[name].dtype) for name, tensor in params.items()}
        )

    def _output(
        self, placed: Tensors, inputs: Mapping[str, Tensor], dropout: int | None, entering: Entering | None
    ) -> Tensor:
        with self._dropout(dropout), starting_from(entering):
            out = functional_call(self.model, placed, kwargs=self._batch(inputs), tie_weights=False)
        return out.logits if hasattr(out, "logits") else torch.stack([out.start_logits, out.end_logits], -1)

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
        return self.until(inputs, depth, params or {}, dropout, entering)

    def until(
        self,
        inputs: Mapping[str, Tensor],
        depth: int,
        params: Mapping[str, Tensor],
        dropout: int | None = None,
        entering: Entering | None = None,
    ) -> Entering:
        """The same, through which gradients pass."""
        if has_prompt(self.model):
            raise NoPrefixError("virtual tokens stand before a text")
        if entering is not None and entering.depth >= depth:
            return entering
        placed, batch = self._placed(params), self._batch(inputs)

        def run() -> None:
            functional_call(self.model, placed, kwargs=batch, tie_weights=False)

        with self._dropout(dropout):
            return Entering(depth, run_until(depth, run, entering))

    def chain(
        self,
        inputs: Mapping[str, Tensor],
        names: Iterable[str],
        loss: Callable[[Tensors, Entering | None], Tensor],
        dropout: int | None = None,
        entering: Entering | None = None,
    ) -> Chain:
        """`loss`, of tensors and where its pass begins, by blocks, from the lowest with a tensor of these names."""
        first, last = self.depth(names), len(self.blocks)

        def here(depth: int, hidden: Tensor | None) -> Entering | None:
            return None if hidden is None else Entering(depth, hidden)

        return Chain(
            range(first, last),
            self.prefix(inputs, first, {}, dropout, entering).hidden if first else None,
            lambda params, low, high, hidden: self.until(inputs, high, params, dropout, here(low, hidden)).hidden,
            lambda params, hidden: loss(params, here(last, hidden)),
        )

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
        return {name: self._fit(onto(tensor, self.device)) for name, tensor in inputs.items() if name != "labels"}

    def _fit(self, tensor: Tensor) -> Tensor:
        """Which token sees which, (rows, 1, tokens, tokens), as what every kind of attention adds to its scores."""
        if tensor.dtype != torch.bool or tensor.dim() < 4:
            return tensor
        dtype = self.model.dtype
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device).masked_fill_(
            ~tensor, torch.finfo(dtype).min
        )

    @contextmanager
    def _dropout(self, seed: int | None) -> Iterator[None]:
        if seed is None:
            yield
            return
        layers: list[Any] = [module.lora_dropout for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.train()
        try:
            with seeded_by_block(seed, self.device):
                yield
        finally:
            for layer in layers:
                layer.eval()
