"""The method table and the way to bring one's own."""

import sys
from pathlib import Path
from typing import get_args

import pytest

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.config import RunConfig, keys
from spry_app.errors import SpryError
from spry_app.methods import ASSIGNMENTS, AUTO, METHODS, Deal, Method, get_method
from spry_app.methods.assignment import depth_split
from spry_app.optimizers import SERVER_OPTIMIZERS

OWN = '''
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.methods import Method

def pairs(deal):
    """Clients 2i and 2i+1 train the same unit."""
    return [[deal.units[(client // 2 + deal.round) % len(deal.units)]] for client in range(deal.clients)]

paired = Method(gradient=GRADIENTS["forward-mode"], assign=pairs, paper="this test")
not_a_method = 3
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_method.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_method", raising=False)
    return "own_method"


def test_every_row_names_its_source() -> None:
    assert all(method.paper for method in METHODS.values())


def test_a_users_method_is_found_by_its_path(own_module: str) -> None:
    method = get_method(RunConfig(method=f"{own_module}:paired"))
    deal = Deal(units=("a", "b"), depths=(0, 1), sizes=(1, 1), blocks=2, memory_mib=(0.0,) * 4, round=0)
    assert method.assign(deal) == [["a"], ["a"], ["b"], ["b"]]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sprry", "Did you mean 'spry'?"),
        ("own_method:not_a_method", "must be a spry_app.methods.Method"),
        ("own_method:absent", "cannot be imported"),
        ("no_such_module:x", "cannot be imported"),
    ],
)
def test_an_unknown_method_is_refused_in_words(own_module: str, name: str, sentence: str) -> None:
    with pytest.raises(SpryError) as caught:
        get_method(RunConfig(method=name))
    assert sentence in str(caught.value)


def test_keys_replace_single_choices_of_a_method() -> None:
    flat = {"method": "spry", "gradient": "backprop", "server.optimizer": "adam"}
    method = get_method(RunConfig.from_flower(flat))
    assert method.gradient is GRADIENTS["backprop"]
    assert method.server_optimizer == "adam"
    assert method.assign is METHODS["spry"].assign
    assert get_method(RunConfig.from_flower(flat | {"assign": "by-depth"})).assign is depth_split


@pytest.mark.parametrize(
    ("key", "table"),
    [("gradient", {*GRADIENTS, AUTO}), ("assign", {*ASSIGNMENTS}), ("server.optimizer", {*SERVER_OPTIMIZERS})],
)
def test_a_key_that_replaces_a_choice_may_be_any_row_of_its_table(key: str, table: set[str]) -> None:
    assert set(get_args(dict(keys())[key].annotation)) == {"", *table}


def test_scalars_cannot_be_asked_of_backprop() -> None:
    with pytest.raises(SpryError, match="made of slopes"):
        get_method(RunConfig(method="spry-per-iteration", gradient="backprop"))


def test_a_method_without_source_is_refused() -> None:
    with pytest.raises(ValueError, match="paper"):
        Method(gradient=GRADIENTS["backprop"], paper="")
