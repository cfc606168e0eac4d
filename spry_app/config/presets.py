"""Settings that go together, by name. Nothing here checks them: they are run-config keys like any others."""

from collections.abc import Collection, Mapping

from spry_app.config.data_sets import DATA_SETS

Scalar = int | float | bool | str

METHODS: dict[str, dict[str, Scalar]] = {
    # What the published runs used (SPRY, arXiv:2405.15551): 10 clients a round of 100 to 1000, up to 1500 rounds. What
    # the row of the method says already is left to it, so that another method can be set beside.
    "spry-paper": {
        "method": "spry",
        "directions": "gaussian",
        "head": "shared",
        "head-gradient": "forward",
        "adapter.kind": "lora",
        "adapter.rank": 1,
        "adapter.alpha": 1.0,
        "adapter.dropout": 0.1,
        "adapter.targets": "",
        "adapter.bias": "none",
        "adapter.subspace": "none",
        "data.max-length": 64,
        "data.partition": "dirichlet",
        "data.alpha": 1.0,
        "client.optimizer": "adamw",
        "client.learning-rate": 1e-4,
        "client.head-learning-rate": 0.0,
        "client.local-epochs": 1,
        "client.local-steps": 0,
        "client.batch-size": 8,
        "client.directions": 1,
        "server.learning-rate": 1e-2,
        "server.head-learning-rate": 0.0,
        "server.beta1": 0.9,
        "server.beta2": 0.99,
        "server.tau": 1e-3,
        "server.fraction-train": 0.01,
        "server.min-train-nodes": 10,
        "server.min-available-nodes": 10,
    },
    # FedSPZO, arXiv:2502.10239v2: everything perturbed, the head too.
    "fedspzo": {
        "method": "fedspzo",
        "head-gradient": "forward",
        "data.max-length": 256,
        "client.batch-size": 8,
    },
    # Few numbers between the first singular vectors of every matrix (arXiv:2405.17604), measured by all clients along
    # orthogonal directions. Steps are chosen for the embedded data set.
    "spry-core": {
        "method": "spry-per-iteration",
        "assign": "every-unit",
        "directions": "orthogonal",
        "head-gradient": "exact",
        "adapter.kind": "lora",
        "adapter.rank": 4,
        "adapter.alpha": 4.0,
        "adapter.targets": "all-linear",
        "adapter.subspace": "core",
        "adapter.frame": "singular",
        "client.directions": 8,
        "server.learning-rate": 0.072,
    },
}
"""Name -> run-config keys. Keys that happen to be defaults are written down too, as defaults may change. None names a
model: a default, as "minilm" is, could then not be chosen beside it.
"""
METHODS["spry"] = METHODS["spry-paper"]

_TOGETHER: dict[str, dict[str, Scalar]] = {"fedspzo/sst2": {"data.max-length": 32}}
"""What goes with a method on one data set only."""

PRESETS: dict[str, dict[str, Scalar]] = METHODS | {
    f"{method}/{data}": {"data.partition": "iid"} | keys | DATA_SETS[data] | _TOGETHER.get(f"{method}/{data}", {})
    for method, keys in METHODS.items()
    for data in DATA_SETS
}
"""How to train, or "how/data set": the same on that data set, which has no households to deal its rows out by."""


AUTO = "auto"
_OF_METHOD = {"spry-per-iteration": "spry-core"}
"""Method -> what "auto" stands for. Slopes of LoRA's own numbers add little or nothing to a head in runs of the lengths
that were measured, those of a core do (docs/results.md); exact gradients make the most of LoRA.
"""


def of_preset(
    flat: Mapping[str, object], defaults: Mapping[str, object], chosen: Collection[str] = ()
) -> dict[str, Scalar]:
    """What the preset in `flat` says of keys that `flat` leaves open, and of AUTO, which it is; nothing without one.

    A key that differs from its default wins, and one that is `chosen`. Flower hands over every key, whether it was set
    or not, so there a key that was set to its default cannot be told from one that was not, and is the preset's. With
    another `adapter.kind`, which may have no use for the preset's other keys of the adapter, those are left alone.
    """

    def is_open(key: str) -> bool:
        return key not in chosen and flat.get(key, defaults[key]) == defaults[key]

    name, found = str(flat.get("preset", defaults["preset"])), dict[str, Scalar]()
    if name == AUTO:
        adapter = (key for key in defaults if key.startswith("adapter."))
        method = str(flat.get("method", defaults["method"]))
        name = found["preset"] = _OF_METHOD.get(method, "") if all(map(is_open, adapter)) else ""
    preset = PRESETS.get(name, {})
    found |= {key: value for key, value in preset.items() if is_open(key)}
    if "adapter.kind" in preset.keys() - found.keys() and flat["adapter.kind"] != preset["adapter.kind"]:
        found = {key: value for key, value in found.items() if not key.startswith("adapter.")}
    return found
