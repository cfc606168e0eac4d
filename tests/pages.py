"""What the pages show as code, as files and as sessions of a terminal. Not a test itself."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in this language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def files(page: Path) -> dict[str, str]:
    """Name -> text of every block that begins with a comment of its name: `# my_method.py`."""
    found = {}
    for block in blocks(page, r"(?:python|toml)"):
        if named := re.match(r"# ([\w-]+\.(?:py|toml))\b", block):
            assert named[1] not in found, f"{page.name} has {named[1]} twice"
            found[named[1]] = block
    return found


def write_files(page: Path, folder: Path) -> dict[str, str]:
    """All of them, into `folder`."""
    found = files(page)
    for name, text in found.items():
        (folder / name).write_text(text)
    return found


def session(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page's sessions (`console` blocks), each with the lines that it is shown to print."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks(page, "console")).splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found
