"""A report opened in headless Chromium: text in light and dark, nothing loaded or run, nothing wider than a phone."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from runs import HOSTILE, write_run

from spry_app.atomic import write_whole
from spry_app.report import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open a report in")

# A page around the report, as it may not run anything itself: opens all that is folded and says what is seen.
AROUND = """<!doctype html><body style="margin:0">
<iframe id="frame" src="report.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="seen"></pre>
<script>
document.getElementById("frame").onload = function () {{
  const inside = this.contentWindow, page = this.contentDocument;
  page.querySelectorAll("details").forEach((fold) => {{ fold.open = true; }});
  const wide = [...page.body.querySelectorAll("*")].filter((part) =>
    part.getBoundingClientRect().right > {width} + 0.5 && !part.closest(".scroll"));
  document.getElementById("seen").textContent = JSON.stringify({{
    text: page.body.innerText,
    harmed: Boolean(window.harmed),
    loaded: inside.performance.getEntriesByType("resource").map((entry) => entry.name),
    elements: page.querySelectorAll("script, img, link, iframe").length,
    wide: wide.map((part) => part.outerHTML.slice(0, 120)),
    scrolls: page.documentElement.scrollWidth,
    ground: inside.getComputedStyle(page.body).backgroundColor,
    unreachable: [...page.querySelectorAll(".scroll")].filter((part) => part.tabIndex !== 0).length,
    unnamed: [...page.querySelectorAll("figure > svg")].filter((part) => !part.getAttribute("aria-label")).length,
    charts: page.querySelectorAll("figure > svg").length,
  }});
}};
</script>"""


def opened(html: str, folder: Path, width: int = 375, dark: bool = False) -> dict[str, Any]:
    """What Chromium makes of it."""
    write_whole(folder / "report.html", html)
    (folder / "around.html").write_text(AROUND.format(width=width))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions"]
    command += [f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000"]
    command += ["--window-size=1400,1000", "--dump-dom", f"file://{folder / 'around.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 12 clients and 12 units with long names, where much went wrong."""
    units = [f"transformer.blocks.{place}.attention.self.query" for place in range(11)]
    reasons = {2: [f"node 7000: {HOSTILE}", f"node 7001: {'no-space-to-break-at-' * 30}"]}
    folder = tmp_path_factory.mktemp("runs") / ("1" * 80)
    return write_run(folder, clients=12, units=[*units, "head"], reasons=reasons, config={"data.source": "x" * 150})


@pytest.mark.parametrize("dark", [False, True])
def test_a_report_on_a_phone(run: Path, tmp_path: Path, dark: bool) -> None:
    seen = opened(render([run]), tmp_path, dark=dark)
    for words in ("60.0 %", "Who trained which units when", "<script>", "Failures and refusals", "Configuration"):
        assert words in seen["text"]
    assert not seen["harmed"] and not seen["loaded"] and not seen["elements"]
    assert seen["wide"] == [] and seen["scrolls"] <= 375
    assert not seen["unreachable"] and not seen["unnamed"] and seen["charts"] >= 8
    brightness = sum(map(int, re.findall(r"\d+", seen["ground"])))
    assert brightness < 100 if dark else brightness > 700


def test_runs_side_by_side_on_a_phone(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", config={"method": "fedavg"})
    seen = opened(render([run, other]), tmp_path)
    assert "2 other" in seen["text"]
    assert seen["wide"] == [] and seen["scrolls"] <= 375 and not seen["loaded"]


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    seen = opened("<body style='margin:0'><img src='data:,'><p style='width:900px'>wide</p>", tmp_path)
    assert seen["elements"] == 1 and seen["scrolls"] == 900 and "wide" in seen["wide"][0]
