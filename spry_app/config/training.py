"""How it is trained: clients, server, limits, noise, privacy, telemetry; of every key meaning, unit, default, check."""

from typing import Literal

from pydantic import Field

from spry_app.config.section import Budget, Count, Fraction, Limit, Seconds, Section, StepSize


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
    deadline_s: Limit = 0.0
    """Seconds of a round that a client has for its local steps; 0 for as many as they take. It begins none that would
    end later, going by what the last ones took, does one in any case, and replies with those that are done. What it
    weighs then, and what the seconds do not count (loading, scoring, the way), is in docs/methods.md. Below
    `server.round-timeout-s`."""
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
    weighting: Literal["examples", "precision"] = "examples"
    """What a reply weighs in the mean: the "examples" it was trained on; or its "precision", by which few directions
    weigh less than many, and any less than an exact gradient (methods.precision), all the more of the mean then being
    of those clients' rows. Replies of one kind weigh examples either way. "precision" is for replies of weights or a
    gradient, without privacy."""
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
    """How long to wait for the replies of a round; what becomes of later ones, `late-replies` says."""
    late_replies: Literal["drop", "discount"] = "drop"
    """Replies that come after `round-timeout-s`: lost, or used once, in the round in which they come, with the change
    times `late-discount`. They are waited for as long again; until then their nodes are asked for nothing else. Not for
    replies of slopes, nor with privacy."""
    late_discount: float = Field(0.5, gt=0, le=1)
    """What is left of a late client's change, for each round that it is late."""
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
    """Of the global model, in a round that is evaluated (`server.evaluate-every`): of the main metric of `data.task`,
    accuracy for "classification", the part of the tokens for "causal-lm"."""


class NoiseConfig(Section):
    """What follows from how much of an estimate made of slopes is noise (methods.noise)."""

    target_cosine: Fraction = 0.0
    """Expected cosine of a unit's mean estimate with its gradient that is enough: a client takes the fewest directions
    with which all of its units reach it, at most `client.directions`, and more clients take part, up to all that there
    are, where that does not do. 0 for `client.directions` and no more clients."""
    scale_step: bool = False
    """The server's step of each unit is multiplied by the expected cosine of its mean estimate with the gradient (1 for
    a head with an exact gradient), so that one `server.learning-rate` serves few and many dimensions."""


class TelemetryConfig(Section):
    """Where a run's numbers go, beside metrics.jsonl, which is always written."""

    sinks: str = ""
    """Names, with commas between them: "tensorboard", "wandb", "mlflow", "trackio" (each an extra: `pip install
    'spry[wandb]'`), or "package.module:object" for your own, which is called with the run's folder and its flat config
    and gives an object with `round(number, values)` and `end(completed)`. They write to files and go online only where
    their own variables say so (WANDB_MODE=online, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID). One that raises after the
    start is left out, with a warning."""


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
