"""Every key of a run is told in docs/configuration.md and by `spry keys`, from the code that checks it."""

from pathlib import Path

from typer.testing import CliRunner

from spry_app.cli import app
from spry_app.config import RunConfig
from spry_app.config.reference import as_markdown, entries

ROOT = Path(__file__).parent.parent


def test_every_key_has_a_meaning() -> None:
    assert [entry.key for entry in entries()] == list(RunConfig.defaults())
    assert not [entry.key for entry in entries() if len(entry.meaning) < 10]


def test_what_a_key_may_be_is_what_is_checked() -> None:
    allowed = {entry.key: entry.allowed for entry in entries()}
    assert allowed["client.directions"] == "whole number, at least 1"
    assert allowed["server.beta1"] == "number, at least 0, below 1"
    assert allowed["head"] == '`"shared"`, `"split"`'
    assert allowed["data.equal-sizes"] == "true or false"
    assert allowed["client.memory-budget-mib"] == "number or text"


def test_the_page_is_that_of_the_code() -> None:
    """spry keys --markdown > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text() == as_markdown()
    done = CliRunner().invoke(app, ["keys", "--markdown"])
    assert done.stdout == as_markdown()


def test_a_word_finds_names_and_meanings() -> None:
    done = CliRunner().invoke(app, ["keys", "checkpointed"])
    assert done.exit_code == 0
    assert done.stdout.startswith("gradient = ")
    done = CliRunner().invoke(app, ["keys", "cucumber"])
    assert (done.exit_code, done.stdout) == (1, "")
