"""Faults made for real on loopback, processes killed by their ids, one after another; a table of what came of them.

    python tests/drills.py [--only NAME ...]

Nothing is left running. Exit status: 0 only if every promise of every drill was kept.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's, whatever is installed

from deployed import deployment, spry  # noqa: E402
from faults import DRILLS, Drill  # noqa: E402
from ground import Broken, Ground, Row  # noqa: E402
from left_running import left_running  # noqa: E402

from spry_app.errors import SpryError  # noqa: E402
from spry_app.launcher.processes import Processes  # noqa: E402
from spry_app.launcher.superlink import SuperLink, environment  # noqa: E402

NODES = ("first", "second")


@contextmanager
def plain(folder: Path, names: Sequence[str] = NODES) -> Iterator[Ground]:
    """A SuperLink with a database, and nodes without keys."""
    for name in ("logs", "empty"):
        (folder / name).mkdir()
    with Processes(environment(folder), folder / "empty") as processes:
        superlink, options = SuperLink(processes, folder / "logs"), ["--database", str(folder / "state.db")]
        superlink.start(*options)
        ground = Ground(folder, processes, superlink, options)
        try:
            for name in names:
                ground.node(name)
            yield ground
        finally:
            ground.stop()


@contextmanager
def keyed(folder: Path) -> Iterator[Ground]:
    """As deploy/ has it: TLS, two nodes with keys that are registered, and a gate where there is nginx."""
    with deployment(folder) as deployed:
        ground = Ground(folder, deployed.processes, deployed.superlink, [])
        try:
            for name in NODES:
                spry("node", name, "--folder", str(deployed.etc))
                spry("register", name, "--folder", str(deployed.etc))
                key = deployed.etc / "nodes" / f"{name}.key"
                ground.adopt(name, *deployed.supernode(name, f'data = "{ground.rows(name)}"\n', key))
            yield ground
        finally:
            ground.stop()


def perform(drills: Sequence[Drill], ground: Ground) -> Iterator[tuple[Drill, Row | str]]:
    """What came of each; a sentence where a promise was broken."""
    for drill in drills:
        try:
            yield drill, drill.perform(ground)
        except (Broken, SpryError) as error:
            ground.heal()
            yield drill, str(error)


def run(drills: Sequence[Drill], temporary: Path) -> Iterator[tuple[Drill, Row | str]]:
    """Each on the ground that it needs; `temporary` is empty again in the end."""
    for ground, mine in ((plain, [d for d in drills if not d.keyed]), (keyed, [d for d in drills if d.keyed])):
        if mine:
            folder = Path(tempfile.mkdtemp(prefix="s", dir=temporary))
            try:
                with ground(folder) as made:
                    yield from perform(mine, made)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def line(drill: Drill, row: Row | str) -> str:
    """Of the table."""
    if isinstance(row, str):
        return f"| {drill.fault} | BROKEN: {row.splitlines()[0]} | | |"
    return f"| {drill.fault} | {row.happened} | {row.seconds:.0f} | {row.rounds} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [drill.name for drill in DRILLS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    only = parser.parse_args().only
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what was started is stopped
    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        return _table([drill for drill in DRILLS if drill.name in only], Path(temporary))


def _table(drills: Sequence[Drill], temporary: Path) -> int:
    os.environ |= {"TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tempfile.tempdir = str(temporary)
    broken, usual = False, list[float]()
    print("| fault | what happened | seconds lost | rounds lost |\n|---|---|---:|---:|", flush=True)
    for drill, row in run(drills, temporary):
        print(line(drill, row), flush=True)
        broken |= isinstance(row, str)
        if isinstance(row, str):
            print(row, file=sys.stderr)
        else:
            usual.append(row.usual_s)
    if usual:
        print(f"\nA round without a fault took {min(usual):.0f} to {max(usual):.0f} s.")
    if left := left_running(temporary):
        print("Left running:", *left, sep="\n", file=sys.stderr)
    return int(broken or bool(left))


if __name__ == "__main__":
    sys.exit(main())
