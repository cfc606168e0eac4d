"""What the pages say exists: links, places, pictures, commands of the program, keys and values of a run."""

import re
import shlex
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer.main
import yaml
from pages import DOCS, ROOT

from spry_app.cli import app
from spry_app.config import RunConfig

PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
PROGRAM = typer.main.get_command(app)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def places(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them: one that comes again has a number."""
    found: list[str] = []
    for head in re.findall(r"^#+ (.+)$", prose(page), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head)
        found.append(re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-"))
    return {name + (f"-{again}" if (again := found[:at].count(name)) else "") for at, name in enumerate(found)}


def prose(page: Path) -> str:
    """The page without its blocks of code, in which a # begins no heading and a bracket no link."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_and_every_picture_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if re.match(r"\w+:", link):
            assert link.startswith(("https://", "mailto:")), link
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not place or place in places(target), link
    assert not re.findall(r"\]\[|^\[[^]]+\]: |<(?:img|a) ", prose(page), re.M), "a link that is not looked at above"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_picture_says_in_words_what_it_shows_and_is_one(page: Path) -> None:
    for words, path in re.findall(r"!\[([^]]*)\]\(([^)\s]+)\)", prose(page)):
        assert len(words) > 10, path
        content = (page.parent / path).read_bytes()
        if path.endswith(".svg"):
            picture = ElementTree.fromstring(content)
            assert {part.tag.rpartition("}")[2] for part in picture.iter()}.isdisjoint(
                {"script", "image", "foreignObject"}
            )
            assert "prefers-color-scheme: dark" in content.decode()
        else:
            assert content.startswith(b"\x89PNG")


def test_the_readme_says_of_every_page_what_it_is_for_and_there_is_no_picture_that_nobody_shows() -> None:
    (table,) = re.findall(r"^## Where to read on\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    assert set(re.findall(r"\]\(([^)]+)\)", table)) == {named(page) for page in PAGES} - {"README.md"}
    shown = {path for page in PAGES for path in re.findall(r"!\[[^]]*\]\((?:docs/)?([^)]+)\)", page.read_text())}
    assert {path.name for path in DOCS.iterdir() if path.suffix != ".md"} == shown


def commands() -> list[tuple[str, str]]:
    """Every `spry …` in a code block or between backticks, with the page it is on."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
        lines = [line.removeprefix("$ ") for line in blocks.splitlines()]
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
        found += [(named(page), each) for each in lines + inline if each.startswith("spry ")]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_is_one_of_the_program_with_keys_and_values_that_it_takes(page: str, command: str) -> None:
    words = shlex.split(command.split("  #")[0])[1:]
    known = PROGRAM
    while words and words[0] in getattr(known, "commands", {}):
        known = known.commands[words.pop(0)]  # type: ignore[attr-defined]
    options = {name for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help"}
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
