"""How long a text a model has places for. Nothing here reads one."""

from torch import nn

_NAMES = ("position", "wpe")
"""What is in the names of tables with a row for each place."""


def positions(model: nn.Module) -> int | None:
    """Tokens that a text may have at most; None where places are not looked up in a table, as with rotary ones."""
    found = [
        # Where padding has a row, places are counted from the next (RoBERTa); or from an offset (OPT).
        table.num_embeddings
        - max((-1 if table.padding_idx is None else table.padding_idx) + 1, getattr(table, "offset", 0))
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and any(part in name.rpartition(".")[2] for part in _NAMES)
    ]
    return min(found, default=None)
