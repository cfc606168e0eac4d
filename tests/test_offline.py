"""A run that says offline tries to download nothing, and says what it lacks. Every connection but to this machine ends
the process that tries it.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from federation import tiny_run

from spry_app.config import RunConfig

ROOT = Path(__file__).parent.parent
_GUARDED = """
import ipaddress, os, socket, sys

def tell(address):
    host = str(address[0])
    if host != "localhost" and not (host.replace(".", "").isdigit() and ipaddress.ip_address(host).is_loopback):
        print("TRIED", host, flush=True)
        os._exit(9)

plain_connect, plain_lookup = socket.socket.connect, socket.getaddrinfo

def connect(self, address):
    if self.family != socket.AF_UNIX:
        tell(address)
    return plain_connect(self, address)

def lookup(host, *rest, **more):
    tell((host,))
    return plain_lookup(host, *rest, **more)

socket.socket.connect, socket.getaddrinfo = connect, lookup
"""
"""Names are looked up before anything is connected to, so a machine without a network sees the attempt too."""
_CLIENT = '''
from benchmarks.local_grid import LocalGrid, identify
from spry_app.protocol import introduction_request, refusal_reason
identify()

def ask(**changed):
    """What a node says to the first message of a run."""
    (reply,) = LocalGrid(1, RUN | changed).send_and_receive([introduction_request(100, "")])
    print(refusal_reason(reply), flush=True)
'''
_SERVER = '''
from pathlib import Path
from federation import Federation
from spry_app.errors import SpryError
from flwr.app import Context, RecordDict
from spry_app.server.run import run

def serve(**changed):
    """How far a server comes: without nodes, to where it waits for some."""
    own = {"server.wait-timeout-s": 0.1, "output-dir": FOLDER}
    try:
        run(LocalGrid(0, RUN), Context(1, 0, {}, RecordDict(), RUN | own | changed))
    except SpryError as error:
        print(error, flush=True)
'''


def guarded(folder: Path, code: str, keys: dict[str, Any] | None = None) -> tuple[int, str]:
    """Exit status and output of `code` in a process that has empty caches and no say about being offline."""
    run = tiny_run(folder) | {"client.worker": "off"} | (keys or {})
    facts = f"RUN, FOLDER = {run!r}, {str(folder)!r}\n"
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_HOME": str(folder / "hf"), "SPRY_CACHE": str(folder / "cache"), "PYTHONPATH": "tests"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _GUARDED + facts + _CLIENT + _SERVER + code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def test_a_run_with_the_key_asks_the_network_for_nothing_and_says_what_it_lacks(tmp_path: Path) -> None:
    """One process serves several runs, as a worker does."""
    status, said = guarded(
        tmp_path,
        """
federation = Federation(Path(FOLDER, "run"), RUN | {"offline": True})
federation.start(clients=2)
print("clients:", [line.answered for line in federation.recorder.rounds])
ask(offline=True, **{"data.source": "nobody/rows", "data.config": "small", "data.num-labels": 0})
ask(offline=True, **{"model.name": "nobody/model", "model.revision": "v1"})
serve(offline=True)
serve(offline=True, **{"data.source": "nobody/rows"})
serve(offline=True, **{"model.name": "nobody/model"})
ask(**{"model.name": "nobody/model"})
""",
    )
    assert status == 9 and said.rstrip().endswith("TRIED huggingface.co"), said  # the last one, and not before
    assert said.count("TRIED") == 1 and "2, 2]" in said, said
    beforehand = "Nothing is downloaded, as offline is true or HF_HUB_OFFLINE is set: get it on this machine beforehand"
    assert said.count(beforehand) == 4, said
    assert "data.source 'nobody/rows' (data.config 'small', split 'train') cannot be loaded" in said
    assert "with `python -c \"from datasets import load_dataset; load_dataset('nobody/rows', 'small')\"`" in said
    assert "model.name is 'nobody/model': no sequence-classification model could be loaded" in said
    assert "with `hf download nobody/model --revision v1`" in said and "with `hf download nobody/model`" in said
    assert "0 of 2 nodes connected" in said


@pytest.mark.slow
def test_without_the_key_rows_too_would_be_asked_for(tmp_path: Path) -> None:
    status, said = guarded(tmp_path, "ask(**{'data.source': 'nobody/rows', 'data.num-labels': 0})")
    assert status == 9 and said.rstrip().endswith("TRIED huggingface.co"), said


def test_the_variable_of_a_machine_holds_whatever_the_run_says(tmp_path: Path) -> None:
    code = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from spry_app import offline
offline.set_offline(False)
print(os.environ["HF_HUB_OFFLINE"], offline.advice("x")[:22])
offline._asked, offline._before = False, None
offline.set_offline(True)
import huggingface_hub, datasets.config
from huggingface_hub import constants
offline.set_offline(False)
print(os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
print(huggingface_hub.is_offline_mode())
offline.set_offline(True)
print(constants.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE)
print(huggingface_hub.is_offline_mode())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    said = done.stdout.splitlines()
    assert said == ["1  Nothing is downloaded", "None False False", "False", "True True", "True"], (
        done.stdout + done.stderr
    )


def test_a_run_is_not_offline_unless_it_says_so() -> None:
    assert RunConfig().offline is False and RunConfig.from_flower({"offline": True}).offline
