"""A model as a task sees it: at given tensors, dropout masks and hidden states to begin with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from spry_app.models.blocks import Entering

if TYPE_CHECKING:
    from spry_app.models.adapted import AdaptedModel


@dataclass(frozen=True)
class Bound:
    """A tasks.Model."""

    adapted: "AdaptedModel"
    params: Mapping[str, Tensor]
    dropout: int | None
    entering: Entering | None

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.adapted.logits(self.params, inputs, self.dropout, self.entering)

    def next_token_loss(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self.adapted.next_token_loss(self.params, inputs, labels, self.dropout, self.entering)

    def next_token_scores(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        assert not self.params, "scored are the tensors that are loaded"
        return self.adapted.next_token_scores(inputs, labels, self.entering)
