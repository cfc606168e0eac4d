"""What is broken on purpose, and what must come of it: a function a fault. Grounds and runs are ground.py's."""

import contextlib
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from deployed import spry
from ground import ROUNDS, Ground, Node, Row, Run, kill, promise, standing_still

from spry_app.launcher.logs import read

DEADLINE_S = 60.0
SLACK_S = 15.0
"""Of a busy machine, beside a deadline: Flower looks for replies every few seconds."""
STEPS_S = 20.0
"""That clients have for their steps."""
FORGOTTEN_S = 75.0
"""After which Flower has given up a process whose heartbeats have ended: twice 30 s, and a look."""


@dataclass(frozen=True)
class Drill:
    """name: for the command line. fault: for the table. keyed: needs a ground with TLS and node keys."""

    name: str
    fault: str
    perform: Callable[[Ground], Row]
    keyed: bool = False


def client_process(ground: Ground) -> Row:
    """The next process takes the message up, or Flower answers in its place."""
    node = ground.nodes["first"]
    run = ground.submit()
    run.until_round(1)
    run.until_training(node)
    client = node.client()
    promise(client, "a process of Flower's for the message")
    kill(client)
    run.completed()
    second = run.round(2)
    promise(run.took_s(2) < FORGOTTEN_S + run.usual_s() + SLACK_S, f"round 2 ends; it took {run.took_s(2):.0f} s")
    promise(_all_answer(run, 3), "both nodes answer from round 3 on")
    promise(second["answered"] == 2 or second["reasons"], "the round says what is missing")
    return run.row(f"{_said(run, 2)}; both nodes answer from round 3 on")


def worker(ground: Ground) -> Row:
    node = ground.nodes["first"]
    run = ground.submit()
    run.until_round(1)
    run.until_training(node)
    kill(node.worker.process())
    run.completed()
    second = run.round(2)
    promise(second["answered"] == 1 and "ended in the middle of this message" in second["reasons"][0], "who and why")
    promise(_all_answer(run, 3), "both nodes answer from round 3 on")
    promise("ended while it trained; now: Slices(micro_batch=2" in read(node.worker.log), "its next steps are smaller")
    return run.row(f"{_said(run, 2)}; another worker answers from round 3 on, with smaller steps")


def memory(ground: Ground) -> Row:
    """The worker may have 24 MiB more than it took for small steps; one of 64 examples and 512 directions takes
    hundreds. What just fits in one round may not in a later one.
    """
    ground.submit(**{"num-server-rounds": 1}).completed()
    node = ground.nodes["first"]
    process = psutil.Process(node.worker.process())
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 24 * 2**20, -1))
    large = {"client.batch-size": 64, "client.micro-batch": 64, "client.directions": 512}
    run = ground.submit(**large, **{"client.directions-at-once": 512, "client.local-steps": 1, "num-server-rounds": 8})
    run.completed()
    process.rlimit(psutil.RLIMIT_AS, (-1, -1))
    without = [line for line in run.rounds if line["reasons"]]
    promise(without, "it was out of memory")
    promise(all("set client.memory-budget-mib" in line["reasons"][0] for line in without), "the budget is named")
    again = [line["round"] for line in run.rounds if line["answered"] == 2 and line["round"] > without[0]["round"]]
    promise(again, f"the node answers again, with less at once; {[line['answered'] for line in run.rounds]}")
    promise(node.worker.process() == process.pid, "the worker stays")
    return run.row(f"{_said(run, without[0]['round'])}; small enough in round {again[0]}")


def supernode(ground: Ground) -> Row:
    node = ground.nodes["second"]
    run = ground.submit(**{"num-server-rounds": ROUNDS + 2})
    run.until_round(1)
    run.until_training(node)
    kill(node.process)
    node.process.wait()
    ground.restart(node)
    run.completed()
    promise(run.took_s(2) < FORGOTTEN_S + run.usual_s() + SLACK_S, f"round 2 ends; it took {run.took_s(2):.0f} s")
    promise(run.round(2)["reasons"], "the round says who is missing")
    promise(run.rounds[-1]["answered"] == 2, "the node takes part again")
    return run.row(f"{_said(run, 2)}; it is a new node to Flower, and takes part from round {run.back(2)} on")


def supernode_with_key(ground: Ground) -> Row:
    """Started again every 15 s until it stays, as the unit does (Restart=always, RestartSec=15)."""
    node = ground.nodes["second"]
    before, folder = _listed(ground), ("--folder", str(ground.folder / "etc"))
    run = ground.submit(**{"num-server-rounds": ROUNDS + 1})
    run.until_round(1)
    run.until_training(node)
    kill(node.process)
    node.process.wait()
    tries = _start_until_it_stays(ground, node, run)
    run.completed()
    promise(tries > 1 and "305" in read(node.log), f"it is refused at first, with code 305; {tries} tries")
    promise(_listed(ground) == before, "it is the same node; " + spry("list", *folder))
    promise(run.round(2)["reasons"], "the round says who is missing")
    promise(run.rounds[-1]["answered"] == 2, "the node takes part again")
    return run.row(f"{_said(run, 2)}; refused {tries - 1} times (305), then the same node from round {run.back(2)} on")


def superlink(ground: Ground) -> Row:
    run = ground.submit()
    run.until_round(1)
    run.until_training(ground.nodes["first"])
    ground.kill_superlink()
    ground.superlink.start(*ground.options)
    outcome = run.end()
    promise(not outcome.completed, f"the run is marked as failed; it is {outcome.status}")
    again = _resumed(ground, run)
    return again.row(f"the run is {outcome.status}; resumed after round {again.after}, nodes came back by themselves")


def server_app(ground: Ground) -> Row:
    run = ground.submit()
    run.until_round(1)
    run.until_training(ground.nodes["first"])
    app = ground.server_app()
    promise(app, "a process of Flower's for the run")
    kill(app)
    outcome = run.end()
    promise(not outcome.completed, f"the run is marked as failed; it is {outcome.status}")
    again = _resumed(ground, run)
    return again.row(f"the run is {outcome.status}; resumed after round {again.after}")


def slow(ground: Ground) -> Row:
    node = ground.nodes["first"]
    run = ground.submit(**{"server.round-timeout-s": DEADLINE_S, "num-server-rounds": ROUNDS + 2})
    with standing_still(run, node):
        run.until_round(2)
    run.completed()
    promise(run.took_s(2) < DEADLINE_S + SLACK_S, f"round 2 ends at its deadline; it took {run.took_s(2):.0f} s")
    promise("no answer within server.round-timeout-s" in run.round(2)["reasons"][0], "who was too slow")
    promise(run.rounds[-1]["answered"] == 2, "the node takes part again")
    return run.row(f"{_said(run, 2)}; the node answers from round {run.back(2)} on")


def late_reply(ground: Ground) -> Row:
    """The worker stands still until its round is over, and goes on then."""
    node = ground.nodes["first"]
    keys = {"method": "spry", "server.late-replies": "discount", "num-server-rounds": ROUNDS + 2}
    run = ground.submit(**keys, **{"server.round-timeout-s": DEADLINE_S})
    with standing_still(run, node):
        run.until_round(2)
    run.completed()
    used = [(line["round"], said) for line in run.rounds for said in line["late"]]
    promise(len(used) == 1 and "its reply to round 2" in used[0][1], f"its reply is used, and once; {used}")
    promise(not any(line["refused"] for line in run.rounds), "nothing is refused")
    promise(run.rounds[-1]["answered"] == 2, "the node takes part again")
    return run.row(f"{_said(run, 2)}; the reply is used in round {used[0][0]}, discounted")


def partial(ground: Ground) -> Row:
    """The worker stands still until its deadline is over, in the middle of a task."""
    node = ground.nodes["first"]
    run = ground.submit(**{"client.deadline-s": STEPS_S, "client.local-steps": 128})
    with standing_still(run, node):
        run.wait(STEPS_S)
    run.completed()
    second = run.round(2)
    done, asked = second["steps"], second["steps-asked"]
    promise((second["answered"], second["reasons"]) == (2, []), f"nobody is lost; {second['reasons']}")
    promise(second["partial"] >= 1 and 2 <= done < asked == 256, f"part of the steps; {done} of {asked}")
    return run.row(f"2 of 2 answer in round 2, with {done} of {asked} local steps")


def late(ground: Ground) -> Row:
    run = ground.submit(**{"num-server-rounds": ROUNDS + 4})
    run.until_round(1)
    ground.node("third")
    run.completed()
    answered = [line["answered"] for line in run.rounds]
    promise(answered[1] == 2 and answered[-1] == 3, f"first two nodes, then three; {answered}")
    promise(not any(line["refused"] for line in run.rounds), "nothing is refused")
    ground.remove("third")
    return run.row(f"takes part from round {answered.index(3)} on")


def disk(ground: Ground) -> Row:
    with _small_disk(ground.folder / "disk") as folder:
        run = ground.submit(**{"output-dir": str(folder)})
        run.until_round(1)
        ballast = folder / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        outcome = run.end()
        said = f"The disk of {run.folder} is full"
        promise(not outcome.completed and said in outcome.details, f"the run says so; {outcome}")
        ballast.unlink()
        again = _resumed(ground, run)
    return again.row(f"the run fails (“The disk of … is full”); with room again resumed after round {again.after}")


DRILLS = (
    Drill("client-process", "client process killed in training", client_process),
    Drill("worker", "worker killed in training", worker),
    Drill("memory", "worker out of memory", memory),
    Drill("supernode", "SuperNode without a key killed, started again", supernode),
    Drill("supernode-with-key", "SuperNode with a key killed, started again", supernode_with_key, keyed=True),
    Drill("superlink", "SuperLink killed, started again", superlink),
    Drill("server-app", "server app killed", server_app),
    Drill("slow", f"a node slower than the deadline ({DEADLINE_S:g} s)", slow),
    Drill("late-reply", 'the same, with server.late-replies="discount"', late_reply),
    Drill("partial", f"a node slower than client.deadline-s ({STEPS_S:g} s)", partial),
    Drill("late", "a node that joins late", late),
    Drill("disk", "disk full at the server", disk),
)


def _resumed(ground: Ground, run: Run) -> Run:
    """The same run, gone on with: nothing of the rounds that had ended is lost."""
    again = ground.submit(**run.keys | {"resume": str(run.folder)})
    again.completed()
    again.goes_on(run)
    numbers = [line["round"] for line in again.rounds]
    promise(numbers == list(range(ROUNDS + 1)), f"each round is there once; {numbers}")
    promise((run.folder / "adapter" / "adapter_model.safetensors").exists(), "there is an adapter")
    return again


def _all_answer(run: Run, first: int) -> bool:
    return all(line["answered"] == 2 for line in run.rounds if line["round"] >= first)


def _said(run: Run, number: int) -> str:
    """Of a round: how many answered, and what the log says of the others."""
    line = run.round(number)
    sentences = [re.sub(r"^node \d+: (<class '[\w.]+'>:<')?", "", reason) for reason in line["reasons"]]
    reasons = "; ".join(sentence if len(sentence) < 90 else f"{sentence[:88]} …" for sentence in sentences)
    return f"{line['answered']} of {line['asked']} answer in round {number}" + (f" (“{reasons}”)" if reasons else "")


def _listed(ground: Ground) -> dict[str, str]:
    """Node id of each name."""
    lines = spry("list", "--folder", str(ground.folder / "etc")).splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}


def _start_until_it_stays(ground: Ground, node: Node, run: Run) -> int:
    """How many tries that takes; 15 s apart."""
    for tries in itertools.count(1):
        length = len(read(node.log))
        ground.restart(node)
        run.until(
            lambda length=length: node.process.poll() is not None or "SuperNode ID" in read(node.log)[length:],
            "the node is let in, or not",
        )
        if node.process.poll() is None:
            return tries
        promise(tries < 12, "the node is let in again")
        run.wait(15.0)
    raise AssertionError


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MiB. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
