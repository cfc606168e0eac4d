"""The app on a real SuperLink and SuperNodes, all on this machine; each node trains on a file of its own.

    python deploy/loopback.py first.jsonl second.jsonl --run-config 'num-server-rounds=3' --output-dir outputs

Free loopback ports, no TLS, nothing left running. Exit status: 0 only if the run completed. Nodes on several machines
are started by the same commands, with addresses, certificates and keys added.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from spry_app.config import Scalar
from spry_app.errors import SpryError
from spry_app.launcher.logs import Tail, cause
from spry_app.launcher.processes import Processes, usable_cores
from spry_app.launcher.progress import describe
from spry_app.launcher.settings import Simulation, run_config
from spry_app.launcher.superlink import HOST, Outcome, SuperLink, environment, free_port, write_settings
from spry_app.worker.place import default_place

APP = Path(__file__).resolve().parent.parent


def main() -> int:
    arguments = _arguments()
    output = arguments.output_dir.resolve()
    folder = Path(tempfile.mkdtemp(prefix="spry-"))
    logs, neutral = folder / "logs", folder / "empty"
    logs.mkdir()
    neutral.mkdir()
    kept = output / "not-started"
    try:
        settings = run_config(Simulation(APP, len(arguments.data), arguments.run_config or (), output_dir=output))
        with Processes(environment(folder), neutral) as processes:
            superlink = SuperLink(processes, logs)
            superlink.start("--database", str(folder / "state.db"))
            for index, node in enumerate(_nodes(arguments)):
                _start_node(processes, superlink.port, folder / f"node-{index}", logs / f"node-{index}.log", node)
            run_id = superlink.submit(APP, settings, {})
            kept = output / run_id
            outcome = _follow(superlink, run_id, kept / "metrics.jsonl", logs / "run.log")
        if not outcome.completed:
            raise SpryError(f"The run failed: {cause(outcome.details, logs / 'run.log')}")
    except SpryError as error:
        print(f"{error}\nLogs: {shutil.copytree(logs, kept / 'logs', dirs_exist_ok=True)}", file=sys.stderr)
        return 1
    finally:
        # Workers outlive the SuperNodes whose messages started them.
        stopped = sum([default_place(home).stop() for home in folder.glob("node-*")])
        print(f"Stopped {stopped} workers")
        shutil.rmtree(folder, ignore_errors=True)
    print(f"Completed: {kept}")
    return 0


def _nodes(arguments: argparse.Namespace) -> list[dict[str, Scalar]]:
    """The node config of each node: its number, its own rows and, if given, its own copy of the model, its memory."""
    nodes: list[dict[str, Scalar]] = [
        {"partition-id": index, "num-partitions": len(arguments.data), "data": str(path.resolve())}
        for index, path in enumerate(arguments.data)
    ]
    for node, memory_mib in zip(nodes, arguments.memory_mib or (), strict=False):
        node["memory-budget-mib"] = memory_mib
    return nodes if arguments.model is None else [node | {"model": str(arguments.model.resolve())} for node in nodes]


def _start_node(processes: Processes, port: int, home: Path, log: Path, settings: dict[str, Scalar]) -> None:
    """One SuperNode with a home of its own, as on a machine of its own, and its part of this machine's cores."""
    home.mkdir()
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, usable_cores() // int(settings["num-partitions"]))
    command = ["flower-supernode", "--insecure", "--superlink", f"{HOST}:{port}", "--port", str(free_port())]
    command += ["--node-config", str(write_settings(home / "node-config.toml", settings))]
    processes.start(command, log, FLWR_HOME=str(home), OMP_NUM_THREADS=str(threads))


def _follow(superlink: SuperLink, run_id: str, metrics: Path, log: Path) -> Outcome:
    tail = Tail(metrics)

    def look() -> None:
        for line in tail.new_lines():
            row = json.loads(line)
            print(f"Round {row['round']}/{row['rounds']}  {describe(row, None)}", flush=True)

    return superlink.follow(run_id, log, look)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="training file of each node; as many nodes as files")
    parser.add_argument("--run-config", action="append", help="as of `flwr run`")
    parser.add_argument("--model", type=Path, help="checkpoint folder that every node loads instead of model.name")
    parser.add_argument("--memory-mib", type=float, nargs="+", help="what a training step may take, of each node")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    if arguments.memory_mib and len(arguments.memory_mib) != len(arguments.data):
        parser.error(f"--memory-mib has {len(arguments.memory_mib)} numbers for {len(arguments.data)} nodes")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
