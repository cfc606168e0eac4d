"""What a node says of the machine it runs on, checked. How it is measured and what is made of it is not known here."""

from dataclasses import asdict, dataclass
from typing import Self

from spry_app.protocol.records import MalformedReply, Record, said
from spry_app.slope_log import LARGEST

MOST_NAMED = 120
"""Characters of an accelerator's name."""


@dataclass(frozen=True)
class Device:
    """None, or an empty name: not stated.

    accelerator: what the node computes on. forward_ms: milliseconds of a forward pass of one of its examples, measured
    or as its node config says. free_mib: memory that is free there beside the loaded model. battery_percent: charge of
    its battery; plugged: whether it runs on mains. power_limit_w: watts that it may take for what it computes on.
    """

    accelerator: str = ""
    forward_ms: float | None = None
    free_mib: float | None = None
    battery_percent: float | None = None
    plugged: bool | None = None
    power_limit_w: float | None = None

    def stated(self) -> dict[str, str | float | bool]:
        """What there is, by the names that it has in messages and files."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def of(cls, record: Record) -> Self:
        """From a record that has what `stated` gave. Raises MalformedReply for what cannot be."""
        accelerator = record.get("accelerator", str) if "accelerator" in record else ""
        if len(accelerator) > MOST_NAMED:
            raise MalformedReply(f"the name of an accelerator of more than {MOST_NAMED} characters")
        forward_ms, free_mib, battery, limit = (
            record.get(name, float) if name in record else None
            for name in ("forward-ms", "free-mib", "battery-percent", "power-limit-w")
        )
        if forward_ms is not None and not 0 < forward_ms <= LARGEST:
            raise MalformedReply(f"an impossible time of a forward pass: {forward_ms} ms")
        if free_mib is not None and not 0 <= free_mib <= LARGEST:
            raise MalformedReply(f"an impossible free memory: {free_mib} MiB")
        if battery is not None and not 0 <= battery <= 100:
            raise MalformedReply(f"an impossible battery: {battery} percent")
        if limit is not None and not 0 < limit <= LARGEST:
            raise MalformedReply(f"an impossible power limit: {limit} W")
        plugged = record.get("plugged", bool) if "plugged" in record else None
        return cls(said(accelerator), forward_ms, free_mib, battery, plugged, limit)
