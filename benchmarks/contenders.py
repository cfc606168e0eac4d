"""The rows of the convergence benchmark: adapters, what is compared on them, and the sweeps. Nothing is run here."""

from collections.abc import Callable, Mapping

from benchmarks.plan import Variant
from spry_app.config import Scalar

Keys = Mapping[str, Scalar]
Rows = dict[str, Variant]
TARGETS = "adapter.targets"

ALL_LINEAR = "query,key,value,intermediate.dense,output.dense"
"""Of MiniLM's blocks (the last name is that of attention's matrix too); its pooler, also `dense`, is none of them."""


QUERY_VALUE = ""
"""The app's own choice for LoRA."""
_INSIDE = {
    QUERY_VALUE: ("attention.self.query", "attention.self.value"),
    ALL_LINEAR: (
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    ),
}
"""adapter.targets -> what they are called in a block of MiniLM."""
BLOCKS = 6
"""Of MiniLM; that which takes the mean of all tokens (model.pooling) comes above them and is not adapted."""


def upper(rows: Rows, count: int) -> Rows:
    """The rows with their adapters in the upper so many blocks alone: what lies below is then computed once."""

    def moved(keys: Keys) -> Keys:
        places = [f"{b}.{name}" for b in range(BLOCKS - count, BLOCKS) for name in _INSIDE[str(keys[TARGETS])]]
        return {**keys, TARGETS: ",".join(places)}

    def whole(keys: Keys) -> Keys:
        return moved({TARGETS: QUERY_VALUE, **keys}) if keys.get("adapter.kind") != "none" else keys

    return {name: Variant(whole(row.keys), row.like and whole(row.like)) for name, row in rows.items()}


def _core(targets: str, rank: int) -> Keys:
    """Fixed factors between singular vectors, at a scale of 1."""
    return {
        "adapter.subspace": "core",
        "adapter.rank": rank,
        "adapter.alpha": float(rank),
        "adapter.frame": "singular",
        TARGETS: targets,
    }


def _shared(count: int) -> Keys:
    """One vector for all matrices (Uni-LoRA, whose rank is 4)."""
    return {
        "adapter.subspace": "shared",
        "adapter.coordinates": count,
        "adapter.rank": 4,
        "adapter.alpha": 4.0,
        TARGETS: ALL_LINEAR,
    }


ADAPTERS: dict[str, Keys] = {
    "shared 13": _shared(13),
    "shared 48": _shared(48),
    "shared 192": _shared(192),
    "shared 768": _shared(768),
    "core (query and value)": _core(QUERY_VALUE, 8),
    "core (rank 4)": _core(ALL_LINEAR, 4),
    "core": _core(ALL_LINEAR, 8),
    "core (rank 16)": _core(ALL_LINEAR, 16),
    "lora": {},
    "lora (all linear)": {TARGETS: ALL_LINEAR},
}
"""On all of MiniLM these have 13, 48, 192, 768, 768, 576, 2,304, 9,216, 9,216 and 41,472 numbers beside the head."""

PER_STEP: Keys = {"client.local-steps": 1, "client.optimizer": "sgd"}
"""Clients talk to the server after each batch; what they step themselves is linear, so that only its size matters."""
BACKPROP: Keys = {"method": "fedsgd", "server.optimizer": "yogi", **PER_STEP}
"""Differs from SPRY per iteration in the gradient alone."""
ORTHOGONAL: Keys = {"directions": "orthogonal"}


def _directions(count: int) -> Keys:
    return {"client.directions": count, "client.directions-at-once": min(count, 16)}


ESTIMATE: Keys = {"method": "spry-per-iteration", "assign": "every-unit", **PER_STEP, **ORTHOGONAL, **_directions(8)}
"""The new default's way to a gradient."""
DEFAULT_ADAPTER = "core (rank 4)"
DEFAULT: Keys = {**ESTIMATE, **ADAPTERS[DEFAULT_ADAPTER]}
"""The preset "spry-core", which a run has of which nothing is said, with a step size of its own."""

NEW = "new default"
BEST_LORA = ("lora backprop", "lora backprop (all linear)", "lora fedavg")
ZEROTH = ("fedmezo", "decomfl", "zeroth order (same adapter)")
PUBLISHED_ZEROTH = ZEROTH[:2]

_ONE_RATE: Keys = {"client.head-learning-rate": 0.0, "server.head-learning-rate": 0.0}
"""A perturbed head has the step size of the rest: that of the table is chosen with exact gradients."""

ROWS: Rows = {
    "head only": Variant({"method": "spry-per-iteration", "adapter.kind": "none", **PER_STEP}),
    "lora backprop": Variant(BACKPROP),
    "lora backprop (all linear)": Variant({**BACKPROP, **ADAPTERS["lora (all linear)"]}),
    "lora fedavg": Variant({"method": "fedavg"}),
    "backprop (same adapter)": Variant({**BACKPROP, **ADAPTERS[DEFAULT_ADAPTER]}),
    "spry as published": Variant({"preset": "spry-paper", "method": "spry", **_directions(1), **_ONE_RATE}),
    "spry per iteration": Variant({"method": "spry-per-iteration", **_directions(1), **PER_STEP}),
    "fedmezo": Variant({"method": "fedmezo", **_directions(1)}),
    "decomfl": Variant({"method": "decomfl", "client.optimizer": "sgd", **_directions(8)}),
    ZEROTH[2]: Variant({**DEFAULT, "gradient": "central-difference"}),
    NEW: Variant(DEFAULT),
    "new default (gaussian)": Variant({**DEFAULT, "directions": "gaussian"}),
    "new default (scalars alone)": Variant({**DEFAULT, "head-gradient": "forward", **_ONE_RATE}),
}
"""Every row has an exact head, but the published SPRY and the last one."""


def sweep_d() -> Rows:
    """The new default's estimate and backprop on adapters of ever more numbers: the second tells what the adapter
    itself can do.
    """
    return {
        f"{told} on {adapter}": Variant({**keys, **ADAPTERS[adapter]})
        for adapter in ADAPTERS
        if adapter != "lora (all linear)"
        for told, keys in (("backprop", BACKPROP), ("estimate", ESTIMATE))
    }


COUNTS = (1, 4, 8, 32)
"""Six clients with the last one cover the 192 numbers that the adapter has in two blocks."""


def sweep_directions(adapter: str = DEFAULT_ADAPTER) -> Rows:
    """K of both kinds on one adapter; from 8 on, the step size found at 8 will do."""
    rows = {"backprop": Variant({**BACKPROP, **ADAPTERS[adapter]})}
    for kind in ("orthogonal", "gaussian"):
        keys = {**ESTIMATE, **ADAPTERS[adapter], "directions": kind}
        for count in COUNTS:
            like = {**keys, **_directions(8)} if count > 8 else None
            rows[f"{kind} K={count}"] = Variant({**keys, **_directions(count)}, like=like)
    return rows


TABLES: dict[str, Callable[[], Rows]] = {"": lambda: ROWS, "d": sweep_d, "K": sweep_directions}
"""--sweep -> its rows."""


def twins(rows: Mapping[str, Variant]) -> dict[str, str]:
    """Row -> the one that differs from it in having the exact gradient, step by step; where there is one."""
    adapters = {
        name: frozenset(item for item in row.keys.items() if item[0].startswith("adapter."))
        for name, row in rows.items()
    }
    exact = {adapters[name]: name for name, row in rows.items() if BACKPROP.items() <= row.keys.items()}
    return {name: exact[adapter] for name, adapter in adapters.items() if adapter in exact}
