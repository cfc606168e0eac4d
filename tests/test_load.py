"""What the load benchmark reads of processes, and of its readings. It runs whole in its own command alone."""

import subprocess
import sys

import psutil

from benchmarks.load import ROLES, Reading, grown, memory


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


def test_growth_is_between_the_first_fifth_and_the_last() -> None:
    readings = [Reading(round_, 0.0, {"server": 100.0 + round_}) for round_ in range(1, 11)]
    assert grown(readings) == {"from": 3, "to": 10, "mib": 7.0}
