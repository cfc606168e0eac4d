"""The folder `adapter/` of a run: what PEFT loads, its tokenizer, the names of its classes and a card. Every file in it
is whole at any time.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, save_adapter

LABELS = "labels.json"


def write_adapter(
    folder: Path, adapted: AdaptedModel, tensors: Mapping[str, Tensor], labels: Sequence[str], card: str, whole: bool
) -> None:
    """Replace what is in `folder`, a file at a time.

    whole: also what does not change during a run, which otherwise is written if it is not there.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_adapter(adapted, tensors, fresh, whole or not (folder / LABELS).exists())
    (fresh / LABELS).write_text(json.dumps(list(labels)) + "\n")
    (fresh / "README.md").write_text(card)
    folder.mkdir(exist_ok=True)
    for file in sorted(fresh.iterdir(), key=lambda file: file.name == LABELS):  # last: the others are there then
        file.replace(folder / file.name)
    fresh.rmdir()


def read_labels(folder: Path) -> list[str]:
    """Names of the classes, in order; [] where the folder has none."""
    try:
        found = json.loads((folder / LABELS).read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SpryError(
            f"{folder / LABELS} cannot be read ({error}): write the names of the classes as a list."
        ) from None
    return [str(name) for name in found]
