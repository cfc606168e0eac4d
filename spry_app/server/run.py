"""A run from its config to its result: load, federate, evaluate, save. The rounds themselves are the Strategy's."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from logging import INFO
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError

from spry_app.autodiff.memory import MIB
from spry_app.config import RunConfig
from spry_app.data import label_counts, label_names, load_corpus
from spry_app.errors import SpryError, is_disk_full
from spry_app.methods import AUTO, BY_MEMORY, Layout, Method, get_method
from spry_app.models import AdaptedModel, load_model, start_from
from spry_app.models.pooled import is_copy
from spry_app.models.sources import public_name
from spry_app.offline import set_offline
from spry_app.plugins import load_object
from spry_app.prefix import frozen
from spry_app.protocol import from_arrays, to_arrays
from spry_app.report import REPORT
from spry_app.server.adapter_folder import write_adapter
from spry_app.server.card import card
from spry_app.server.checkpoint import load
from spry_app.server.choice import Advise, OneGradient
from spry_app.server.ending import reported
from spry_app.server.frame_file import load_frame, save_frame
from spry_app.server.held_out import BATCH, held_out, score_of
from spry_app.server.memory import step_memory, step_peaks
from spry_app.server.picture import draw
from spry_app.server.record import Recorder
from spry_app.server.roster import versions
from spry_app.server.stopping import Stopped, end_round
from spry_app.server.strategy import SpryStrategy
from spry_app.server.telemetry import Telemetry, opened
from spry_app.tasks import Encoded, get_task

_TRIED = 256
"""Rows among which the longest is looked for, to measure a step."""
Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True)
class Federated:
    """What the rounds of a run left behind. test: rows of the server's own test set, None where it has none."""

    adapted: AdaptedModel
    method: Method
    arrays: ArrayRecord
    recorder: Recorder
    test: Encoded | None


def run(grid: Grid, context: Context, advise: Advise | None = None) -> None:
    """Everything a run does. Raises (never exits) where it fails, so that Flower marks the run as failed.

    advise: what chooses a gradient for gradient="auto" (choice.py).
    """
    config = RunConfig.from_flower(context.run_config)
    set_offline(config.offline)
    folder = Path(config.resume or Path(config.output_dir, str(context.run_id))).expanduser().resolve()
    with reported(folder):
        try:
            _run(grid, config, folder, advise)
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise SpryError(
                f"The disk of {folder} is full ({error}). What its last checkpoint holds is kept: make room, and start "
                f"a run with resume={str(folder)!r} and the same settings."
            ) from error


def _run(grid: Grid, config: RunConfig, folder: Path, advise: Advise | None) -> None:
    with opened(config, folder) as telemetry:
        done = federate(grid, config, folder, telemetry, advise)
    rounds = done.recorder.rounds
    _write_adapter(done.adapted, done.arrays, done.method, config, done.recorder, whole=True)
    draw(rounds, folder / "picture.png", title=f"{config.method} on {config.data.source}")
    peaks = step_peaks(done.adapted, done.test, config, done.method) if done.test is not None else {}
    measured = [line.peak_mib for line in rounds if line.peak_mib]
    if config.client.memory_budget_mib and measured:  # each client has cut its steps as it must
        peaks["run"] = max(measured)
    _write_result(folder, done.recorder, done.method, peaks)


def federate(
    grid: Grid,
    config: RunConfig,
    folder: Path,
    telemetry: Telemetry | None = None,
    advise: Advise | None = None,
) -> Federated:
    """Load, and run all rounds; what they cost and gave is written into `folder` as they end.

    With config.resume, `folder` is that of a run which goes on after its last checkpoint.
    """
    checkpoint = load(folder, config) if config.resume else None
    method = get_method(config)
    strategy_class = _strategy_class(config.strategy)
    frame = load_frame(folder, config) if config.resume else None
    task, labels = get_task(config.data), len(label_names(config.data))
    adapted = load_model(config.model, config.adapter, labels, config.seed, frame=frame, task=task)
    task.prepare(adapted, config.data)
    if adapted.sees_mean:
        log(INFO, "The classifier sees the mean of all tokens (model.pooling).")
    if config.adapter.path and not checkpoint:
        start_from(adapted, config.adapter)
    method = method.on(Layout(adapted.depths(), len(adapted.blocks)), config.client)
    test = held_out(config, adapted)
    recorder = Recorder(folder, config, checkpoint.progress.round if checkpoint else None, telemetry)
    if _simulated(grid):
        recorder.roster.labels = functools.partial(label_counts, config.data, config.seed)
    frame = adapted.subspace.sent
    save_frame(frame, folder)
    strategy = strategy_class(
        config=config,
        method=method,
        units=adapted.units,
        tensors=adapted.tensors(),
        fingerprint=adapted.fingerprint,
        recorder=recorder,
        score_on_clients=test is None,
        frame=frame.tensors if frame else None,
    )

    if method.assign in BY_MEMORY and isinstance(strategy, SpryStrategy):
        strategy.step_mib = step_memory(adapted, _some_rows(config, adapted) if test is None else test, config, method)
    one = _one_gradient(config, folder, strategy, advise)
    bottom = None if test is None else frozen(adapted, test, config.client.prefix_cache_mib * MIB, 0, at_once=BATCH)
    if checkpoint:
        checkpoint.check(adapted.tensors())
        _resumable(strategy).resume(checkpoint)

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Central evaluation after each round; closes the round's record and keeps the state."""
        if checkpoint and round_ == 0:  # was scored when the checkpoint was made
            return None
        score = None if test is None else functools.partial(score_of, adapted, test, bottom, arrays)
        try:
            result = end_round(config, recorder, arrays, score)
        finally:
            if isinstance(strategy, SpryStrategy) and len(recorder.rounds) > recorder.current.round:
                strategy.checkpoint().save(folder)
                if round_:
                    _write_adapter(adapted, arrays, method, config, recorder)
        return MetricRecord({**recorder.metrics_of(result)}) if result else None

    rounds = config.num_server_rounds - (checkpoint.progress.round if checkpoint else 0)
    start = checkpoint.tensors if checkpoint else adapted.tensors()
    arrays = _federate(strategy, grid, config, to_arrays(start), rounds, evaluate)
    return Federated(adapted, method.taking(one.gradient if one else ""), arrays, recorder, test)


def _one_gradient(config: RunConfig, folder: Path, strategy: Strategy, advise: Advise | None) -> OneGradient | None:
    """Of a run that leaves it open; its clients are told with their tasks."""
    if config.gradient != AUTO:
        return None
    if advise is None or not isinstance(strategy, SpryStrategy):
        raise SpryError(
            f'gradient="auto" is chosen by Spry\'s own server_app.py and Strategy; strategy is {config.strategy!r}: '
            "name a gradient, or use a Strategy derived from SpryStrategy."
        )
    strategy.fleet.choose = one = OneGradient(config, folder, advise)
    return one


def _write_adapter(
    adapted: AdaptedModel,
    arrays: ArrayRecord,
    method: Method,
    config: RunConfig,
    recorder: Recorder,
    whole: bool = False,
) -> None:
    labels, base = label_names(config.data), public_name(config.model.name)
    pooled = is_copy(str(adapted.model.peft_config["default"].base_model_name_or_path))
    text = card(config, method, recorder.rounds, labels, base, versions(), pooled)
    write_adapter(recorder.folder / "adapter", adapted, from_arrays(arrays), labels, text, whole)


def _federate(
    strategy: Strategy, grid: Grid, config: RunConfig, arrays: ArrayRecord, rounds: int, evaluate: Evaluate
) -> ArrayRecord:
    """All rounds that are left, or those until a limit is reached; the arrays after the last of them."""
    try:
        result = strategy.start(
            grid,
            arrays,
            num_rounds=rounds,
            timeout=config.server.round_timeout_s,
            evaluate_fn=evaluate,
        )
    except Stopped as stopped:
        return stopped.arrays
    return result.arrays or arrays


def _simulated(grid: Grid) -> bool:
    """Whether nodes hold shards of the run's data and nothing else. Importing the class of such a grid takes seconds;
    where there is one it has been imported.
    """
    module = sys.modules.get("flwr.superlink.grid")
    return module is not None and isinstance(grid, module.InMemoryGrid)


def _resumable(strategy: Strategy) -> SpryStrategy:
    if not isinstance(strategy, SpryStrategy):
        raise SpryError(f"A {type(strategy).__name__} cannot be resumed: it is not derived from SpryStrategy.")
    return strategy


def _strategy_class(path: str) -> Callable[..., Strategy]:
    if not path:
        return SpryStrategy
    found = load_object(path, "strategy")
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise SpryError(f"strategy={path!r} is not a class derived from flwr.serverapp.strategy.Strategy.")
    return cast(Callable[..., Strategy], found)


def _some_rows(config: RunConfig, adapted: AdaptedModel) -> Encoded:
    """Rows that a step can be tried on, where there is no test set."""
    rows = load_corpus(config.data).train
    few = rows.select(range(min(_TRIED, len(rows))))
    return get_task(config.data).encode(few, adapted.tokenizer, config.data, True)


def _write_result(folder: Path, recorder: Recorder, method: Method, peaks: dict[str, float]) -> None:
    scored, main = [line for line in recorder.rounds if line.metrics], recorder.task.main_metric
    result: dict[str, Any] = {
        "gradient": method.gradient.name,
        "main-metric": main,
        f"{main}-before": scored[0].main if scored else None,
        f"{main}-after": scored[-1].main if scored else None,
        "metrics-after": scored[-1].metrics if scored else None,
        "peak-mib": peaks.get("run"),
        "peak-mib-backprop": peaks.get("backprop"),
        "stopped": recorder.stopped or None,
        "epsilon": recorder.rounds[-1].epsilon,
        "privacy": recorder.promised or None,
        "warnings": recorder.warnings,
        "rounds": recorder.rounds[-1].round,
        "seconds": recorder.rounds[-1].seconds,
        "adapter": str(folder / "adapter"),
        "metrics": str(recorder.metrics_path),
        "picture": str(folder / "picture.png"),
        "report": str(folder / REPORT),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
