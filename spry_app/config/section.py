"""What a section of the run config is made of: kinds of values, and how keys are written."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Limit = Annotated[float, Field(ge=0, allow_inf_nan=False)]
StepSize = Annotated[float, Field(gt=0)]


def _check_budget(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value in ("", "auto") or (number and 0 < value < math.inf):  # type: ignore[operator]
        return value
    raise ValueError('it must be a positive number of MiB, "auto", or "" for no budget')


Budget = Annotated[int | float | str, BeforeValidator(_check_budget)]


def kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=kebab,
        populate_by_name=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
