"""A run from config to result with a method and a Strategy of the user's own, from a module outside the package."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from federation import make_checkpoint, make_rows
from flwr.app import Context, RecordDict

from benchmarks.local_grid import LocalGrid
from spry_app.errors import SpryError
from spry_app.server.run import run

OWN = '''
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.methods import Method
from spry_app.server.strategy import SpryStrategy

def last_unit(deal):
    """Everyone trains the uppermost unit."""
    return [[deal.units[-1]] for _ in range(deal.clients)]

uppermost = Method(gradient=GRADIENTS["forward-mode"], assign=last_unit, server_optimizer="adam", paper="this test")

class Counting(SpryStrategy):
    """Writes down whom it averaged."""
    rounds = []

    def pseudo_gradient(self, accepted):
        Counting.rounds.append(sorted({unit for task, _ in accepted for unit in task.units}))
        return super().pseudo_gradient(accepted)

class NotAStrategy:
    pass
'''


@pytest.fixture
def run_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "users_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    return {
        "method": "users_own:uppermost",
        "strategy": "users_own:Counting",
        "model.name": str(make_checkpoint(tmp_path / "tiny")),
        "data.source": str(make_rows(tmp_path / "rows.jsonl", 48)),
        "data.test": str(make_rows(tmp_path / "test.jsonl", 16, offset=500)),
        "data.num-labels": 2,
        "data.partition": "iid",
        "client.local-steps": 1,
        "client.directions": 2,
        "num-server-rounds": 2,
        "output-dir": str(tmp_path / "outputs"),
    }


def start(run_config: dict[str, Any]) -> None:
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    run(LocalGrid(3, run_config), context)  # type: ignore[arg-type]


def test_a_users_method_and_strategy_are_used(run_config: dict[str, Any], tmp_path: Path) -> None:
    start(run_config)
    rounds = sys.modules["users_own"].Counting.rounds
    assert rounds == [["encoder.layer.1.attention.self.value", "head"]] * 2
    result = json.loads((tmp_path / "outputs" / "7" / "result.json").read_text())
    assert result["rounds"] == 2
    assert Path(result["adapter"], "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"strategy": "users_own:NotAStrategy"}, "not a class derived from"),
        ({"strategy": "users_own:Absent"}, "strategy='users_own:Absent' cannot be imported"),
        ({"method": "users_own:NotAStrategy"}, "must be a spry_app.methods.Method"),
        ({"metod": "spry"}, "Did you mean 'method'?"),
        ({"data.text-field": "txt"}, "txt"),
        ({"model.name": "/no/such/folder"}, "model.name"),
    ],
)
def test_what_cannot_run_ends_with_a_sentence(run_config: dict[str, Any], keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpryError) as caught:
        start(run_config | keys)
    assert sentence in str(caught.value)


def test_no_secret_of_the_environment_gets_into_outputs_logs_or_errors(
    run_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hf_CanaryCanaryCanaryCanary"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "FLWR_AUTH_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    caplog.set_level(logging.DEBUG)
    start(run_config)
    with pytest.raises(SpryError) as refused:
        start(run_config | {"model.name": "nobody/nothing"})
    written = [path for path in Path(run_config["output-dir"]).rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "result.json"} <= {path.name for path in written}
    assert not [path for path in written if secret.encode() in path.read_bytes()]
    assert secret not in caplog.text + str(refused.value)
