"""What the load benchmark reads of processes, and of its readings. It runs whole in its own command alone."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.load import ROLES, Reading, growth, memory, met


def test_memory_is_read_by_role_and_of_the_living() -> None:
    command = [sys.executable, "-c", "x = bytearray(1 << 25); print(flush=True); input()"]
    server, other, dead = (
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in (ROLES["server"], "another", ROLES["server"])
    )
    with server, other, dead:
        for process in (server, other, dead):
            assert process.stdout and process.stdout.readline()
        family = [psutil.Process(process.pid) for process in (server, other, dead)]
        dead.kill()
        dead.wait()
        found = memory(family)
        server.kill()
        other.kill()
    assert found.keys() == ROLES.keys()
    assert 32 < found["server"] < 64  # of one; two would have more
    assert found["clients"] == found["superlink"] == 0.0


def test_what_grows_with_rounds_is_told_from_what_comes_with_new_nodes(tmp_path: Path) -> None:
    """Half of 16 nodes are met in round 1, then one a round; exact readings, of all rounds but one."""
    lines = [{"hands": [{"nodes": ["0", "1"]}, {"nodes": [str(node) for node in range(2, 8)]}]}]
    lines += [{"hands": [{"nodes": ["0", str(min(node, 15))]}]} for node in range(8, 20)]
    (tmp_path / "assignments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nodes = met(tmp_path)
    assert nodes == [8, 9, 10, 11, 12, 13, 14, 15, 16, 16, 16, 16, 16]
    readings = [Reading(r, 0.0, {"server": 600 + 0.2 * nodes[r - 1] + 0.1 * r}) for r in range(1, 14) if r != 3]
    found = growth([*readings[:-1], Reading(13, 0.0, {"server": 900.0})], nodes)
    assert found["node"] == (pytest.approx(0.2), pytest.approx(0.0, abs=1e-9))
    assert found["round"] == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))
