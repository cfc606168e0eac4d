"""The known places for a run's numbers, a row of SINKS each. They write to files unless their own settings in the
environment say otherwise; no package is imported before its sink is made.

A run that goes on continues what its folder's name began.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from spry_app.config import Scalar

Config = Mapping[str, Scalar]
PROJECT = "spry"


@runtime_checkable
class Sink(Protocol):
    """One place, made with the run's folder and its configuration."""

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """What was measured in a round; 0 is before training."""

    def end(self, completed: bool) -> None:
        """There are no more rounds; `completed` is false where the run failed or was ended."""


class TensorBoard:
    """Event files in the run's folder, which `tensorboard --logdir outputs` shows beside those of other runs."""

    def __init__(self, folder: Path, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder / "tensorboard")
        rows = "".join(f"| {key} | {value} |\n" for key, value in config.items())
        self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}")

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """Written at once: whoever looks wants this round."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def end(self, completed: bool) -> None:
        """Event files know no state of a run."""
        self._writer.close()


class WeightsAndBiases:
    """A run in the run's folder, for `wandb sync`; online with WANDB_MODE=online."""

    def __init__(self, folder: Path, config: Config) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=settings,
        )

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """One step a round."""
        self._run.log(dict(values), step=number)

    def end(self, completed: bool) -> None:
        """As an exit status."""
        self._run.finish(exit_code=0 if completed else 1)


class MLflow:
    """A run in mlflow.db beside the run's folder, or where MLFLOW_TRACKING_URI says."""

    _MOST_PARAMETERS = 100
    """In one request."""

    def __init__(self, folder: Path, config: Config) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parent / 'mlflow.db'}"
        self._client: Any = MlflowClient(uri)
        known = folder / "mlflow-run.txt"
        if known.exists():
            self._run = known.read_text().strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        known.write_text(self._run + "\n")
        parameters = [Param(key, str(value)) for key, value in config.items()]
        for start in range(0, len(parameters), self._MOST_PARAMETERS):
            self._client.log_batch(self._run, params=parameters[start : start + self._MOST_PARAMETERS])

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """All numbers in one request."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, number) for name, value in values.items()])

    def end(self, completed: bool) -> None:
        """Its state as MLflow names it."""
        self._client.set_terminated(self._run, "FINISHED" if completed else "FAILED")


class Trackio:
    """A run in TRACKIO_DIR (by default in the cache of the Hugging Face Hub); on a Space with TRACKIO_SPACE_ID."""

    def __init__(self, folder: Path, config: Config) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run: Any = trackio.init(
            project, name=folder.name, config=dict(config), resume="allow", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """One step a round."""
        self._run.log(dict(values), step=number)

    def end(self, completed: bool) -> None:
        """Waits until all is written."""
        self._run.finish()


SINKS: dict[str, Callable[[Path, Config], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Name in `telemetry.sinks`, and extra of the package (`pip install 'spry[tensorboard]'`)."""
