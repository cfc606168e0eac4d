"""The sections of the run config: meaning, unit, default and check of every key. Nothing here reads what Flower hands
over (run.py), loads a model or opens a file.
"""

import math
from typing import Annotated, Literal

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


class ModelConfig(Section):
    name: str = Field("minilm", min_length=1)
    """Checkpoint of a model for `data.task`: a Hub name, a local path, or "minilm" (extra `demo`)."""
    revision: str = ""
    """Branch, tag or commit of a Hub checkpoint."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How frozen linear weights are kept (bitsandbytes)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of everything that is neither quantised nor trained."""
    device: str = "auto"
    """Where a client computes: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1"."""


class AdapterConfig(Section):
    """What is trained beside the head. A key that its kind does not use must stay at its default (ADAPTER_KEYS)."""

    kind: Literal["lora", "vera", "ia3", "bitfit", "layernorm", "none"] = "lora"
    """"lora"; "vera", two vectors of factors a matrix around random ones that all share; "ia3", factors on the
    activations of some matrices; "bitfit", all biases; "layernorm", all normalisations; "none", the head alone."""
    rank: Count = 1
    """LoRA and VeRA (which wants a large one)."""
    alpha: float = Field(1.0, gt=0)
    """LoRA only: updates are multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """LoRA only."""
    targets: str = ""
    """LoRA, VeRA and IA3: names of the modules to adapt, separated by commas, or "all-linear", every linear layer
    of the transformer blocks. Empty for query and value, whatever the model calls them, or for PEFT's choice (IA3):
    mostly key, value and the last matrix of the feed-forward layer."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """LoRA only: which biases are trained beside it (PEFT's `bias`)."""
    subspace: Literal["none", "core", "combined", "shared", "random"] = "none"
    """LoRA only: what of it is trained. "none", all; "core", rank x rank numbers a matrix between two fixed factors;
    "combined", `coordinates` numbers a matrix, weights of fixed cores; "shared" and "random", `coordinates` numbers in
    all. What is saved is LoRA. The fewer numbers, the less noise in a gradient made of slopes."""
    coordinates: int = Field(0, ge=0, lt=2**31)
    """"combined": numbers trained a matrix, at most rank x rank; "shared", "random": numbers trained in all."""
    frame: Literal["random", "singular"] = "random"
    """"core", "combined": the fixed factors. "random", drawn from `seed` by every node; "singular", the first singular
    vectors of the weights, which the server computes and sends to each node once."""


ADAPTER_KEYS: dict[str, frozenset[str]] = {
    "lora": frozenset({"rank", "alpha", "dropout", "targets", "bias", "subspace", "coordinates", "frame"}),
    "vera": frozenset({"rank", "targets"}),
    "ia3": frozenset({"targets"}),
    "bitfit": frozenset(),
    "layernorm": frozenset(),
    "none": frozenset(),
}
"""adapter.kind -> the other keys of `adapter` that it uses."""
SUBSPACE_KEYS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "core": frozenset({"frame"}),
    "combined": frozenset({"coordinates", "frame"}),
    "shared": frozenset({"coordinates"}),
    "random": frozenset({"coordinates"}),
}
"""adapter.subspace -> the keys of `adapter` that it uses and others do not."""


class DataConfig(Section):
    task: str = Field("classification", min_length=1)
    """What is learned from the rows: "classification", of a text or a pair of texts; or "package.module:object" for a
    LearningTask of your own (spry_app/tasks/task.py). Keys that a task does not use must stay at their defaults."""
    source: str = Field("household", min_length=1)
    """"household" (embedded), a local .jsonl/.csv/.parquet file, or a Hub name."""
    config: str = ""
    """Configuration of a Hub data set, e.g. "sst2" of "glue"."""
    train_split: str = "train"
    """Split of a Hub data set that clients train on."""
    test: str = ""
    """Central test set: a local file, or a split of the source; empty for the embedded set's own, else "test"."""
    text_field: str = Field("text", min_length=1)
    """Column of the text; of its first sentence, for pairs."""
    text_pair_field: str = ""
    """Second sentence, for pairs."""
    label_field: str = Field("label", min_length=1)
    """Column of the label: a whole number from 0 on, or a name."""
    num_labels: int = Field(0, ge=0)
    """Number of classes; 0 takes it from the data, which every node must then see alike."""
    label_names: str = ""
    """Names of the classes in order, separated by commas; needed where each node has its own file with named labels."""
    max_length: int = Field(64, ge=4)
    """Tokens kept of a text; longer ones are cut, and how many were is logged."""
    partition: Literal["iid", "dirichlet", "natural"] = "natural"
    """How a simulation deals the rows to its nodes: as they come, each with labels of its own (`alpha`), or by what a
    field says (`natural-field`)."""
    alpha: float = Field(1.0, gt=0)
    """Concentration of the Dirichlet partition over labels; smaller is less alike."""
    equal_sizes: bool = False
    """Dirichlet: draw what each shard is made of, so that all have as many rows, and not how each label is spread over
    them, which for a small alpha and few labels leaves some of many shards without any."""
    natural_field: str = "household"
    """Field whose values (a user id, a household) are never split between two shards."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Part of every shard kept back to measure personalised accuracy."""


class ClientConfig(Section):
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Of the local steps; begun anew in each round."""
    learning_rate: StepSize = 1e-2
    """Step size of the local steps."""
    head_learning_rate: float = Field(0.0, ge=0)
    """Step size of the head; 0 for the same as the rest. A head with an exact gradient bears a larger one."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the client's optimizer, as torch.optim has it."""
    local_epochs: Count = 1
    """Passes over the shard a round, in per-epoch mode."""
    local_steps: int = Field(0, ge=0)
    """Batches a round, over as many passes as that takes; 0 for local-epochs, or for one batch where the method sends
    slopes or a gradient (which is the mean over these batches, at the tensors of the round)."""
    batch_size: Count = 8
    """Examples of a local step."""
    micro_batch: int = Field(4, ge=0)
    """Examples that pass through the model at once; 0 for the whole batch. Saves memory; changes nothing but rounding
    and dropout masks."""
    directions: Count = 8
    """Random directions averaged per batch (K in the papers)."""
    cut: int = Field(0, ge=0)
    """FedSPZO: number of the block at which the upper half of the model begins; 0 for the middle of the blocks."""
    upper_directions: Count = 4
    """FedSPZO: directions of the upper half for each of the `directions` of the lower one (P2 and P1 in the paper)."""
    candidates: Count = 32
    """FwdLLM: directions drawn for a batch, of which the `directions` nearest to the last update are used at most."""
    variance_threshold: float = Field(0.1, ge=0)
    """FwdLLM: no further direction is used once the variance of the estimated gradient, as a mean over its numbers, is
    at most this. 0 always uses `directions`."""
    directions_at_once: Count = 4
    """Directions that share a forward pass: n cost 1 + n passes instead of 2 n, and n times the memory of one."""
    memory_budget_mib: Budget = ""
    """What a step may take beside the loaded model: micro-batch, directions-at-once and the size of temporaries are
    chosen to fit. "auto" is half of what is free; a node's own `memory-budget-mib` (--node-config) comes first."""
    prefix_cache_mib: int = Field(64, ge=0)
    """Memory for hidden states below the lowest unit that a client trains: they are the same for all directions of a
    step and all steps of a task. Where no client trains the lowest blocks (adapter.targets), half of it is for what
    leaves those, which is the same for the whole run. 0 computes all anew in every pass, as does dropout in the adapter
    with what lies above its lowest block."""
    prefix_cache_disk_mib: int = Field(0, ge=0)
    """Disk, in the folder TMPDIR, for hidden states that do not fit in `prefix-cache-mib`."""
    worker: Literal["auto", "off"] = "auto"
    """"auto": on a SuperNode, one process keeps the model from one message to the next (`spry worker`), and is started
    where there is none. "off" loads it for every message. A simulation's own processes keep it either way."""
    worker_idle_s: float = Field(900.0, ge=0, allow_inf_nan=False)
    """Seconds without a message after which a worker that was started by one ends; 0 for never."""


class ServerConfig(Section):
    optimizer: Literal["", "average", "sgd", "momentum", "adagrad", "adam", "yogi"] = ""
    """Step on the mean of the replies; empty for the method's own. "average" takes the mean as it is."""
    learning_rate: StepSize = 8e-3
    """Step size; not used by "average"."""
    head_learning_rate: float = Field(3e-2, ge=0)
    """Step size of the head; 0 for the same as the rest. A head with an exact gradient bears a larger one."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment, of momentum too."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment (Adam, Yogi)."""
    tau: float = Field(1e-6, gt=0)
    """Added to the root of the second moment by Adagrad, Adam and Yogi. Far below the size of the clients' updates,
    steps do not depend on that size; the papers' 1e-3 goes with updates of that order."""
    fraction_train: float = Field(1.0, gt=0, le=1)
    """Part of the nodes asked each round."""
    fraction_evaluate: Fraction = 1.0
    """Part of the nodes that score the global model on their held-out rows, where the server has no test set."""
    min_train_nodes: Count = 2
    """Nodes asked each round at least, whatever the fraction."""
    min_available_nodes: Count = 2
    """The run starts once this many nodes are connected, and fails if they are not in time."""
    wait_timeout_s: Seconds = 120.0
    """How long to wait for `min-available-nodes`."""
    round_timeout_s: Seconds = 600.0
    """How long to wait for the replies of a round; later ones are lost."""
    max_slope: Limit = 0.0
    """Slopes of a client are cut to at most this, either way, before they are used and logged; 0 for no bound. How many
    were cut is in metrics.jsonl."""
    max_update_norm: Limit = 0.0
    """What a client asks for by tensors (its change of them, or its gradient, over all its units) is scaled down to
    this length (L2); 0 for no bound."""
    evaluate_every: Count = 10
    """Rounds between two evaluations; the last round is always evaluated."""


class StopConfig(Section):
    """Ends a run after the round in which a limit is reached; 0 sets none. That round is evaluated like the last."""

    max_mib_up: Limit = 0.0
    """MiB from the clients to the server, as serialised."""
    max_mib_down: Limit = 0.0
    """MiB from the server to the clients, as serialised."""
    max_forwards: Limit = 0.0
    """What the clients computed, in forward passes of one example through the model."""
    max_seconds: Limit = 0.0
    """Since the server process began with the run."""
    target_accuracy: Fraction = 0.0
    """Of the global model, in a round that is evaluated (`server.evaluate-every`)."""


class NoiseConfig(Section):
    """What follows from how much of an estimate made of slopes is noise (methods.noise)."""

    target_cosine: Fraction = 0.0
    """Expected cosine of a unit's mean estimate with its gradient that is enough: a client takes the fewest directions
    with which all of its units reach it, at most `client.directions`, and more clients take part, up to all that there
    are, where that does not do. 0 for `client.directions` and no more clients."""
    scale_step: bool = False
    """The server's step of each unit is multiplied by the expected cosine of its mean estimate with the gradient (1 for
    a head with an exact gradient), so that one `server.learning-rate` serves few and many dimensions."""


class PrivacyConfig(Section):
    """Differential privacy: two runs that differ in one `unit`, all the rows of a client or one of them, give results
    that nobody can tell apart but for epsilon and `delta`. Neighbours replace it by another (how many there are is
    public), so a bound of `clip` is a sensitivity of 2 `clip`; against a client without rows, whose reply is zero, the
    same noise counts twice. What is protected, and what is not, is in docs/privacy.md.
    """

    mode: Literal["", "central", "local"] = ""
    """Who adds the noise. "central": the server, which sees replies as they are and is trusted with them, to the sum of
    all replies; protected is what leaves it, the tensors or the slope log of each round. "local": each client, to its
    own reply, before it is sent; protected is the reply, from the server too. "" for none."""
    unit: Literal["client", "example"] = "client"
    """Whose presence is hidden: a "client", with all its rows, or one "example" of them ("local" alone): what every row
    says in a local step is bounded by itself, and the step's mean gets the noise before anything is made of it. Rows
    then pass one by one, whatever `client.micro-batch`."""
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    """A client's change of the tensors, or its gradient, over all its units, is scaled down to this length (L2). Where
    the server rebuilds a change from a client's own slopes and adds the noise, that change is part of it. By "example":
    the exact gradient of each row in a step."""
    clip_slopes: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The slopes of a reply, of all its steps, are scaled down to this length (L2) where they get the noise: always in
    "local", in "central" where all clients measure along the same directions (decomfl). By "example": the slopes of
    each row in a step."""
    noise_multiplier: float = Field(1.0, ge=0.01, allow_inf_nan=False)
    """Standard deviation of the noise on every number, in units of its bound (`clip` or `clip-slopes`). By "example":
    on every number of the sum over a batch, which is then divided by `client.batch-size`, or by the rows of a client
    that has fewer."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """At which epsilon is stated; far below one over the number of clients."""
    max_epsilon: Limit = 0.0
    """The run ends before the round that would exceed it; 0 sets none. A first round that would is refused."""
