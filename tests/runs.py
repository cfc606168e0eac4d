"""Folders of runs that never ran: the files a run leaves, with numbers one can check by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spry_app.config import RunConfig

HOSTILE = "<script>window.parent.harmed = true</script><img src=http://example.invalid/x.png onerror=alert(1)>"
LINE: dict[str, Any] = {
    "loss": None,
    "accuracy": None,
    "train-loss": None,
    "personalised-accuracy": None,
    "client-seconds": 0.5,
    "peak-mib": None,
    "asked": 0,
    "answered": 0,
    "refused": 0,
    "clipped": 0,
    "partial": 0,
    "steps": 0,
    "steps-asked": 0,
    "late": [],
    "noise": None,
    "epsilon": None,
    "sampled-from": None,
    "reasons": [],
}


def write_run(
    folder: Path,
    accuracy: Sequence[float | None] = (0.1, 0.4, 0.6),
    *,
    clients: int = 3,
    units: Sequence[str] = ("layer.0.query", "layer.1.query", "head"),
    config: Mapping[str, Any] | None = None,
    reasons: Mapping[int, Sequence[str]] | None = None,
    done: bool = True,
) -> Path:
    """A round for each accuracy, round 0 first; a round takes 10 s, 1 MiB down, half a MiB up and 100 passes.

    In round r client c trains unit (c + r) mod (units - 1), and all train the last. reasons: of a round's lost clients,
    who are the first ones.
    """
    folder.mkdir(parents=True)
    reasons, rounds = reasons or {}, len(accuracy) - 1
    flat = RunConfig.defaults() | {"num-server-rounds": rounds} | dict(config or {})
    (folder / "config.json").write_text(json.dumps(flat))
    nodes = [
        {"node": str(7000 + c), "partition": c, "examples": 9, "heldout": 1, "memory-mib": 0.0, "labels": [c, 10 - c]}
        for c in range(clients)
    ]
    about = {"versions": {"spry": "0.1.0"}, "started": "2026-11-21 22:40 UTC", "units": list(units), "nodes": nodes}
    (folder / "run.json").write_text(json.dumps(about | {"label-names": ["light on", "light off"]}))
    lines, assigned = [], []
    for round_, value in enumerate(accuracy):
        lost = len(reasons.get(round_, ()))
        asked = clients if round_ else 0
        loss = None if value is None else 1 - value
        spent = {"mib-up": 0.5 * round_, "mib-down": 1.0 * round_, "forwards": 100.0 * round_, "seconds": 10.0 * round_}
        counts = {"asked": asked, "answered": asked - lost, "refused": lost, "reasons": list(reasons.get(round_, ()))}
        lines.append(LINE | {"round": round_, "rounds": rounds, "accuracy": value, "loss": loss, **spent, **counts})
        if round_:
            assigned.append({"round": round_, "hands": _hands(round_, clients, len(units), lost)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "assignments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in assigned))
    if done:
        result = {"rounds": rounds, "peak-mib": 5.9, "peak-mib-backprop": 8.4, "stopped": None, "warnings": []}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def _hands(round_: int, clients: int, units: int, lost: int) -> list[dict[str, Any]]:
    return [
        {
            "units": [(client + round_) % (units - 1), units - 1],
            "nodes": [str(7000 + client)],
            "used": [str(7000 + client)] * (client >= lost),
        }
        for client in range(clients)
    ]
