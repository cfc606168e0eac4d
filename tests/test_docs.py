"""What the pages say exists: links and their places, commands of the program, keys and values of a run."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml

from spry_app.cli import app
from spry_app.config import RunConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROGRAM = typer.main.get_command(app)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def places(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", link):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not place or place in places(target), link


def commands() -> list[tuple[str, str]]:
    """Every `spry …` in a code block or between backticks, with the page it is on."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
        lines = [line.removeprefix("$ ") for line in blocks.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        found += [(named(page), each) for each in lines + inline if each.startswith("spry ")]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_is_one_of_the_program_with_keys_and_values_that_it_takes(page: str, command: str) -> None:
    words = shlex.split(command.split("  #")[0])[1:]
    known = PROGRAM
    while words and words[0] in getattr(known, "commands", {}):
        known = known.commands[words.pop(0)]  # type: ignore[attr-defined]
    options = {name for parameter in known.params for name in parameter.opts} | {"--help"}
    assert known is not PROGRAM or set(words) <= options, command
    assert not [word for word in words if word.startswith("-") and word.split("=")[0] not in options]
    for option in ("--run-config", "-c"):
        if option in words and "…" not in (text := words[words.index(option) + 1]):
            RunConfig.from_flower(RunConfig.defaults() | settings(text))


def settings(text: str) -> dict[str, object]:
    """As `flwr run` reads them: `key=value key2="text"`; a folder of a run stands for itself."""
    pairs = re.findall(r'([\w.-]+)=("[^"]*"|\S+)', text)
    return {key: tomllib.loads(f"value = {value}")["value"] for key, value in pairs}


def test_a_citation_has_what_the_format_asks_for() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert found["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
