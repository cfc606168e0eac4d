"""Bad configuration is refused in plain words, before anything is loaded."""

import math
import tomllib
from pathlib import Path

import pytest

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.config import RunConfig, Scalar, keys
from spry_app.config.presets import PRESETS
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method
from spry_app.methods.assignment import cyclic_split

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.mark.parametrize(
    ("flat", "sentence"),
    [
        ({"metod": "spry"}, "Unknown run-config key 'metod'. Did you mean 'method'?"),
        ({"client.learning_rate": 0.1}, "Did you mean 'client.learning-rate'?"),
        ({"local-steps": 2}, "Did you mean 'client.local-steps'?"),
        ({"directions": 2}, "Run-config key 'directions' is 2: input should be '', 'gaussian' or 'orthogonal'"),
        ({"zzz": 2}, "`spry keys` lists them all."),
        ({"client.learning-rate": "high"}, "'client.learning-rate' is 'high': input should be a valid number."),
        ({"client.learning-rate": -1.0}, "greater than 0"),
        ({"client.directions": 0}, "greater than or equal to 1"),
        ({"client.directions": 1.5}, "valid integer"),
        ({"seed": True}, "valid integer"),
        ({"model.quantization": "nf5"}, "'none', 'nf4', 'fp4' or 'int8'"),
        ({"data.holdout": 1.0}, "less than 1"),
        ({"assign": "cyclical"}, "'', 'every-unit', 'cyclic', 'by-depth' or 'by-device'"),
        ({"stop.max-forwards": -1.0}, "greater than or equal to 0"),
        ({"stop.max-seconds": math.inf}, "finite number"),
        ({"stop.target-accuracy": 80.0}, "less than or equal to 1"),
        ({"client.micro-batch": -1}, "greater than or equal to 0"),
        (
            {"client.memory-budget-mib": "lots"},
            "'client.memory-budget-mib' is 'lots': it must be a positive number of MiB",
        ),
        ({"client.memory-budget-mib": 0}, '"auto", or "" for no budget'),
        ({"client.memory-budget-mib": True}, "is True"),
        (
            {"preset": "spry/imdb"},
            "Run-config key 'preset' is 'spry/imdb': known are 'spry-paper', 'fedspzo', 'spry-core', 'spry', each also "
            'on a data set ("spry/sst2": ag_news, sst2, ',
        ),
        ({"preset": "spry-paper", "client.directions": 0}, "'client.directions' is 0"),
        ({"noise.target-cosine": 1.5}, "less than or equal to 1"),
        (
            {"adapter.kind": "loha"},
            "'lora', 'vera', 'ia3', 'bitfit', 'layernorm', 'prompt', 'p-tuning', 'prefix' or 'none'",
        ),
        ({"adapter.kind": "ia3", "adapter.rank": 4}, "adapter.rank is 4, which adapter.kind 'ia3' does not use"),
        ({"adapter.kind": "bitfit", "adapter.targets": "query"}, "adapter.targets is 'query', which adapter.kind"),
        ({"adapter.kind": "none", "adapter.bias": "all"}, "adapter.kind 'none' does not use; leave it 'none'"),
        ({"adapter.kind": "ia3", "adapter.subspace": "core"}, "adapter.subspace is 'core', which adapter.kind 'ia3'"),
        (
            {"adapter.coordinates": 5},
            "adapter.coordinates is 5, which adapter.subspace 'none' does not use; leave it 0",
        ),
        ({"adapter.subspace": "shared"}, "'shared', which needs adapter.coordinates: 1 or more, not 0"),
        (
            {"adapter.subspace": "random", "adapter.coordinates": 5, "adapter.frame": "singular"},
            "adapter.frame is 'singular', which adapter.subspace 'random' does not use; leave it 'random'",
        ),
        ({"privacy.noise-multiplier": 2.0}, "keys of `privacy` are set, but privacy.mode is '', which uses none"),
        ({"privacy.mode": "centre"}, "'', 'central' or 'local'"),
        ({"privacy.mode": "local", "privacy.noise-multiplier": 0.0}, "greater than or equal to 0.01"),
        ({"privacy.mode": "local", "privacy.delta": 1.0}, "less than 1"),
        (
            {"privacy.mode": "central", "strategy": "own:Mine"},
            "strategy is 'own:Mine' and privacy.mode 'central', whose noise Spry's own Strategy adds",
        ),
        (
            {"adapter.subspace": "combined", "adapter.rank": 2, "adapter.coordinates": 5},
            "adapter.coordinates is 5, and adapter.rank 2 leaves 4 a matrix to adapter.subspace 'combined'; lower",
        ),
    ],
)
def test_a_bad_key_is_named_with_what_is_allowed(flat: dict, sentence: str) -> None:
    with pytest.raises(SpryError) as caught:
        RunConfig.from_flower(flat)
    assert sentence in str(caught.value)


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(SpryError, match=r"(?s)data\.holdout.*client\.directions"):
        RunConfig.from_flower({"client.directions": 0, "data.holdout": 2.0})


def test_a_config_survives_flowers_flat_form() -> None:
    config = RunConfig.from_flower({"client.learning-rate": 1, "model.name": "x", "adapter.rank": 4})
    assert config.client.learning_rate == 1.0
    assert RunConfig.from_flower(config.flat()) == config


@pytest.mark.parametrize("budget", ["", "auto", 12, 1.5])
def test_a_budget_is_a_number_or_a_word(budget: float | str) -> None:
    assert RunConfig.from_flower({"client.memory-budget-mib": budget}).client.memory_budget_mib == budget


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_what_was_left_open_and_is_written_down_resolved(name: str) -> None:
    """Flower hands over every default too; what was resolved is read again as it was written."""
    config = RunConfig.from_flower(RunConfig.defaults() | {"preset": name})
    assert config == RunConfig.from_flower({"preset": name})
    assert config.flat() == RunConfig.defaults() | PRESETS[name] | {"preset": name}
    assert RunConfig.from_flower(config.flat()) == config


def test_spry_as_published_is_what_the_paper_says() -> None:
    method = get_method(RunConfig.from_flower({"preset": "spry-paper"}))
    row = (method.gradient, method.assign, method.directions, method.reply, method.send, method.server_optimizer)
    assert row == (GRADIENTS["forward-mode"], cyclic_split, "gaussian", "weights", "weights", "yogi")
    beside = get_method(RunConfig.from_flower({"preset": "spry-paper", "method": "fedavg"}))
    assert (beside.gradient, beside.server_optimizer) == (GRADIENTS["backprop"], "average")


def test_a_key_that_differs_from_its_default_wins_over_the_preset() -> None:
    own = {"client.directions": 3, "client.learning-rate": 0.5, "num-server-rounds": 7}
    config = RunConfig.from_flower(RunConfig.defaults() | {"preset": "spry-paper"} | own)
    assert config.flat() == RunConfig.defaults() | PRESETS["spry-paper"] | {"preset": "spry-paper"} | own
    assert RunConfig.from_flower(config.flat()) == config
    usual = RunConfig.defaults()["server.tau"]
    assert RunConfig.from_flower({"preset": "spry-paper", "server.tau": usual}).server.tau == 1e-3 != usual


def test_a_preset_leaves_an_adapter_of_another_kind_alone() -> None:
    config = RunConfig.from_flower({"preset": "spry-paper", "adapter.kind": "bitfit"})
    assert (config.adapter.kind, config.adapter.dropout, config.client.directions) == ("bitfit", 0.0, 1)


def test_a_run_of_which_nothing_is_said_has_few_numbers_and_little_noise() -> None:
    config = RunConfig.from_flower(RunConfig.defaults())
    assert config.flat() == RunConfig.defaults() | PRESETS["spry-core"] | {"preset": "spry-core"}
    assert RunConfig.from_flower({}) == RunConfig.from_flower(config.flat()) == config
    own = {"server.learning-rate": 0.01, "client.directions": 3, "gradient": "central-difference"}
    assert RunConfig.from_flower(own).flat() == config.flat() | own


@pytest.mark.parametrize(
    "own",
    [
        *({"method": name} for name in METHODS if name != "spry-per-iteration"),
        {"method": "mine:method"},
        {"preset": ""},
        {"adapter.kind": "none"},
        {"adapter.rank": 4},
        {"adapter.path": "adapter"},
    ],
    ids=str,
)
def test_a_method_or_an_adapter_that_is_chosen_has_no_preset(own: dict[str, Scalar]) -> None:
    assert RunConfig.from_flower(RunConfig.defaults() | own).flat() == RunConfig.defaults() | own | {"preset": ""}


def test_what_is_known_to_be_set_wins_over_the_preset_even_where_it_is_the_default() -> None:
    usual, step = RunConfig.defaults(), "server.learning-rate"
    core = usual | PRESETS["spry-core"] | {"preset": "spry-core"}
    assert RunConfig.from_flower(usual, {step}).flat() == core | {step: usual[step]}
    assert RunConfig.from_flower(usual, {"adapter.kind"}).flat() == usual | {"preset": ""}
    paper = usual | {"preset": "spry-paper"}
    assert RunConfig.from_flower(paper, {step}).flat() == paper | PRESETS["spry-paper"] | {step: usual[step]}


def test_every_key_says_what_it_means() -> None:
    assert all("-" not in key.split(".")[-1] or "_" not in key for key, _ in keys())
    assert len(dict(keys())) == len(RunConfig.defaults())


def test_pyproject_lists_every_key_with_its_default() -> None:
    def flatten(table: dict, prefix: str = "") -> dict:
        flat: dict = {}
        for name, value in table.items():
            flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return flat

    listed = flatten(tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"])
    defaults = RunConfig.defaults()
    assert listed == defaults
    assert {key: type(value) for key, value in listed.items()} == {k: type(v) for k, v in defaults.items()}
