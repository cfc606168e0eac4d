"""The whole run config: its top keys, and the way in and out of Flower's flat dict. The others are in sections.py and
training.py.

Flower hands the configuration over as one flat dict (`{"client.learning-rate": 0.1}`) of int, float, bool and str;
an empty string stands for "not set".
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from spry_app.config.data_sets import DATA_SETS
from spry_app.config.presets import AUTO, METHODS, PRESETS, Scalar, of_preset
from spry_app.config.section import Count, Section, kebab
from spry_app.config.sections import ADAPTER_KEYS, SUBSPACE_KEYS, WHOLE_ONLY, AdapterConfig, DataConfig, ModelConfig
from spry_app.config.training import (
    ClientConfig,
    NoiseConfig,
    PrivacyConfig,
    ServerConfig,
    StopConfig,
    TelemetryConfig,
)
from spry_app.errors import SpryError


class RunConfig(Section):
    """One run. `RunConfig.from_flower` is the way in; `defaults()` is what pyproject.toml repeats."""

    preset: str = AUTO
    """Settings that go together (presets.py): "spry", those of the runs that were published (also "spry-paper");
    "fedspzo", of that paper's; "spry-core", few trained numbers and little noise. Each also on a data set of the papers
    (data_sets.py): "spry/sst2". "auto" is "spry-core" where method is "spry-per-iteration" and no key of `adapter` is
    set, else "", which leaves all keys as they are. Keys that are set win over a preset's. `flwr run` cannot tell a key
    that is set to its default from one that is not (`spry run` can): there it is the preset's."""
    method: str = Field("spry-per-iteration", min_length=1)
    """Row of the method table, or "package.module:object" for a Method of your own."""
    strategy: str = ""
    """"package.module:Class" for a Flower Strategy of your own, made with the arguments of SpryStrategy."""
    gradient: Literal[
        "",
        "auto",
        "forward-mode",
        "central-difference",
        "one-sided-difference",
        "backprop",
        "checkpointed-backprop",
        "bisected-backprop",
    ] = ""
    """How a client gets a gradient; empty for the method's own. Central differences are taken over a step of 1e-3,
    one-sided ones over 1e-4, whatever the method's own step. Backpropagation keeps all activations; "checkpointed" what
    enters each block, and computes the rest once more; "bisected" what enters a few blocks (log2 of their number), and
    computes the others again as they are needed: the least memory, for 3.5 to 5 forward passes in all where
    "checkpointed" takes 3. "auto" is for nodes that are alike: before the first round the server takes what `spry plan`
    would advise for the least that a step may take on any of them (`client.memory-budget-mib`, or a node's own
    `memory-budget-mib`), says why, and keeps to it, also when the run is resumed."""
    assign: Literal["", "every-unit", "cyclic", "by-depth", "by-device"] = ""
    """Which client trains which units: all of them, dealt like cards (SPRY), or bands of neighbours with the upper ones
    for the nodes that state the least memory; or "by-device", an exact gradient (the fastest kind that reaches the most
    units) to the nodes whose memory (their `memory-budget-mib`, else `client.memory-budget-mib`) holds one on half of
    the units or more, slopes on a band of upper units to the others, less to one that was out of memory, and fewer
    local steps to one that is much slower than the median; goes well with server.weighting="precision". Empty for the
    method's own."""
    directions: Literal["", "gaussian", "orthogonal"] = ""
    """Of slopes: independent Gaussian ones, whose estimate has the relative squared error (d + 1) / K for d perturbed
    numbers and `client.directions` K; or orthogonal ones, with (d - K) / K: exact at K = d. Clients that hold the same
    units take disjoint parts of one orthogonal frame. Empty for the method's own."""
    send: Literal["", "weights", "log"] = ""
    """What travels down in a method whose clients reply with slopes: every tensor, or the slopes of the rounds that a
    client has missed, from which it rebuilds them. Empty for the method's own."""
    head: Literal["shared", "split"] = "shared"
    """The classification head goes to every client, or is dealt like any other unit. Of no use to a task without a new
    head ("causal-lm")."""
    head_gradient: Literal["exact", "forward"] = "exact"
    """The head's gradient where the method uses slopes: by a backward pass through the head alone, which stores nothing
    of the network (from the passes of the slopes; with differences, and where a model's blocks are no plain sequence,
    from one forward pass more), or perturbed like every other unit, as SPRY was published."""
    num_server_rounds: Count = 40
    """A round: the server asks clients, they train, it takes a step."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of step sizes over the rounds: they stay, or fall to 0 at `num-server-rounds`. The server's, of head
    and rest; the clients' where the server takes the mean as it is ("average"). The last steps then add little noise of
    their own, and take out that of earlier ones."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random of a run follows from it: shards, batches, directions, who takes part."""
    output_dir: str = Field("outputs", min_length=1)
    """Where outputs/<run id>/ is made; relative to the directory of the server process."""
    offline: bool = False
    """Nothing is downloaded, on the server and on every node: models and data sets of the Hub must be in the cache of
    each machine (HF_HOME), or the run fails and says which is not. HF_HUB_OFFLINE=1 says the same of one machine."""
    resume: str = ""
    """Folder of a run that ended early or is to have more rounds (`num-server-rounds`): it goes on after its last
    round, with the same result as if it had never stopped. Only limits, timeouts and, while `schedule` is
    "constant", the number of rounds may differ from it."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    noise: NoiseConfig = NoiseConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    stop: StopConfig = StopConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @field_validator("preset")
    @classmethod
    def _preset_is_known(cls, preset: str) -> str:
        if preset not in ("", AUTO) and preset not in PRESETS:
            ways, data = ", ".join(map(repr, METHODS)), ", ".join(DATA_SETS)
            raise ValueError(
                f"known are {ways}, each also on a data set (\"spry/sst2\": {data}), 'auto', and '' for none"
            )
        return preset

    @model_validator(mode="after")
    def _adapter_keys_are_used(self) -> Self:
        adapter, default = self.adapter, AdapterConfig()
        everything = frozenset(AdapterConfig.model_fields) - {"kind"}
        own = frozenset[str]().union(*SUBSPACE_KEYS.values())
        for key, unused in (
            ("kind", everything - ADAPTER_KEYS[adapter.kind]),
            ("subspace", own - SUBSPACE_KEYS[adapter.subspace]),
            ("subspace", WHOLE_ONLY if adapter.subspace != "none" else frozenset[str]()),
        ):
            for name in sorted(unused):
                got, usual, chosen = getattr(adapter, name), getattr(default, name), getattr(adapter, key)
                if got != usual:
                    raise ValueError(
                        f"adapter.{kebab(name)} is {got!r}, which adapter.{key} {chosen!r} does not use; "
                        f"leave it {usual!r}"
                    )
        return self

    @model_validator(mode="after")
    def _coordinates_fit(self) -> Self:
        adapter = self.adapter
        kind, count, most = adapter.subspace, adapter.coordinates, adapter.rank**2
        if "coordinates" in SUBSPACE_KEYS[kind] and not count:
            raise ValueError(f"adapter.subspace is {kind!r}, which needs adapter.coordinates: 1 or more, not 0")
        if kind == "combined" and count > most:
            raise ValueError(
                f"adapter.coordinates is {count}, and adapter.rank {adapter.rank} leaves {most} a matrix to adapter."
                f"subspace 'combined'; lower adapter.coordinates to {most} or raise adapter.rank"
            )
        return self

    @model_validator(mode="after")
    def _deadline_is_within_the_round(self) -> Self:
        deadline, timeout = self.client.deadline_s, self.server.round_timeout_s
        if deadline >= timeout:
            raise ValueError(
                f"client.deadline-s is {deadline:g}, but replies are waited for server.round-timeout-s = {timeout:g} "
                "seconds at the most; lower the first, or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _privacy_is_what_it_seems(self) -> Self:
        unused = PrivacyConfig(mode=self.privacy.mode)
        if not self.privacy.mode and self.privacy != unused:
            raise ValueError(
                "keys of `privacy` are set, but privacy.mode is '', which uses none; set it, or leave them"
            )
        if self.privacy.mode == "central" and self.strategy:
            raise ValueError(
                f"strategy is {self.strategy!r} and privacy.mode 'central', whose noise Spry's own Strategy adds to "
                "the mean that it makes; leave strategy '', or use privacy.mode 'local'"
            )
        if self.privacy.unit == "example" and self.privacy.mode != "local":
            raise ValueError(
                f"privacy.unit is 'example' and privacy.mode {self.privacy.mode!r}, but only a client sees what each "
                "of its rows says; use privacy.mode 'local', or privacy.unit 'client'"
            )
        return self

    @property
    def most_rows_at_once(self) -> int:
        """Rows of a local step that may pass through the model together."""
        return 1 if self.privacy.unit == "example" else self.client.batch_size

    def evaluates(self, round_: int) -> bool:
        """Whether a round is evaluated: every `server.evaluate-every` rounds, before the first and after the last."""
        return round_ == self.num_server_rounds or round_ % self.server.evaluate_every == 0

    @classmethod
    def from_flower(cls, flat: Mapping[str, Any], chosen: Collection[str] = ()) -> Self:
        """Fill in the preset and check Flower's flat run config. Raises SpryError naming every key that is wrong.

        chosen: keys that are known to have been set, which no preset changes.
        """
        known = dict(keys(cls))
        unknown = [_unknown_key(key, known) for key in flat if key not in known]
        if unknown:
            raise SpryError("\n".join(unknown))
        nested: dict[str, Any] = {}
        for key, value in {**flat, **of_preset(flat, cls.defaults(), chosen)}.items():
            *sections, name = key.split(".")
            target = nested
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise SpryError("\n".join(_sentence(problem) for problem in error.errors())) from None

    def flat(self) -> dict[str, Scalar]:
        """As Flower writes it: kebab-case, dotted."""
        return dict(_flatten(self))

    @classmethod
    def defaults(cls) -> dict[str, Scalar]:
        return cls().flat()


def keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its pydantic field, in order."""
    for name, info in section.model_fields.items():
        key = prefix + kebab(name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from keys(info.annotation, key + ".")
        else:
            yield key, info


def _flatten(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _flatten(value, f"{prefix}{kebab(name)}.")
        else:
            yield prefix + kebab(name), value


def _unknown_key(key: str, known: Mapping[str, FieldInfo]) -> str:
    near = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    hint = f"Did you mean {near[0]!r}?" if near else "`spry keys` lists them all."
    return f"Unknown run-config key {key!r}. {hint}"


def _sentence(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"Run config: {message}."
    return f"Run-config key {key!r} is {problem['input']!r}: {message[0].lower()}{message[1:]}."
