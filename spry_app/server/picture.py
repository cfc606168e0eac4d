"""The picture of a run: loss, accuracy and bytes over rounds. Reads what record.py keeps, nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spry_app.server.record import Round

Curve = tuple[str, Callable[[Round], float | None]]

PANELS: dict[str, tuple[Curve, ...]] = {
    "loss": (("training batches", lambda r: r.train_loss), ("held-out, global model", lambda r: r.loss)),
    "{main_metric}": (
        ("global model, held-out", lambda r: r.main),
        ("personalised, held-out", lambda r: r.personalised_main),
    ),
    "MiB, all clients": (("server to clients", lambda r: r.mib_down), ("clients to server", lambda r: r.mib_up)),
}


def draw(rounds: Sequence[Round], path: Path, title: str) -> None:
    """Write a PNG with one panel a quantity, the main metric of the task among them; one that was never measured leaves
    its curve out.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    main = rounds[-1].main_metric if rounds else "accuracy"
    for axes, (label, curves) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name, value in curves:
            _curve(axes, name, [(line.round, value(line)) for line in rounds])
        axes.set(xlabel="round", ylabel=label.format(main_metric=main))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, name: str, points: list[tuple[int, float | None]]) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), label=name, marker="." if len(known) < 40 else "")
