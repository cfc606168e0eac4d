"""A report says what a run's files say: curves, who trained what, costs, failures. What a node says is never obeyed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import HOSTILE, LINE, write_run
from typer.testing import CliRunner

from spry_app.cli import app
from spry_app.errors import SpryError
from spry_app.report import render
from spry_app.report.clients import Crew, clients_grid, labels_grid, units_grid
from spry_app.report.folder import read_run
from spry_app.report.grid import shortened
from spry_app.report.lines import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart
from spry_app.report.measures import main_quality, shown
from spry_app.report.style import STYLE


class Page(HTMLParser):
    """Text and tables of a page, and everything a browser would load for it or run in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attributes}
        if tag in ("script", "img", "link", "iframe", "object") or names & {"src", "href", "onerror", "onload"}:
            self.loads.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())
        if self._cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))


def page(*folders: Path) -> Page:
    return Page(render(folders))


def test_a_curve_lies_where_its_numbers_say() -> None:
    chart = line_chart("Loss", "round", [("a", [(0, 0.0), (10, 1.0)]), ("b", [(5, 0.25)]), ("none", [])])
    assert chart is not None
    first, second = chart.curves
    assert first.path == f"M{LEFT:.1f} {HEIGHT - BOTTOM:.1f}L{WIDTH - RIGHT:.1f} {TOP:.1f}"
    middle, quarter = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) / 4
    assert second.path == f"M{middle:.1f} {quarter:.1f}"
    assert [tick.text for tick in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert chart.rows == [["0", "0", "-"], ["5", "-", "0.25"], ["10", "1", "-"]]
    assert line_chart("Loss", "round", [("none", [])]) is None


@pytest.mark.parametrize(
    ("points", "share", "ticks"),
    [
        ([(0, 0.7), (1, 0.9)], True, ["70 %", "75 %", "80 %", "85 %", "90 %"]),
        ([(0, 0.0), (1, 24000.0)], False, ["0", "5k", "10k", "15k", "20k", "25k"]),
        ([(0, 3.0)], False, ["2.70", "2.85", "3.00", "3.15", "3.30"]),
        ([(0, 1e-5), (1, 3e-5)], False, ["1e-05", "1.5e-05", "2e-05", "2.5e-05", "3e-05"]),
    ],
)
def test_ticks_tell_themselves_apart(points: list[tuple[float, float]], share: bool, ticks: list[str]) -> None:
    chart = line_chart("Accuracy", "round", [("a", points)], share)
    assert chart is not None
    assert len({tick.text for tick in chart.y_ticks}) == len(chart.y_ticks) >= 3
    if points != [(0, 3.0)]:
        assert [tick.text for tick in chart.y_ticks] == ticks


def test_a_curve_of_ten_thousand_rounds_is_thinned_and_keeps_its_ends() -> None:
    chart = line_chart("Loss", "round", [("a", [(x, x * x) for x in range(10_001)])])
    assert chart is not None
    assert len(chart.rows) == 300
    assert (chart.rows[0], chart.rows[-1]) == (["0", "0"], ["10,000", "100,000,000"])
    assert "300 points" in chart.note


def test_units_are_named_by_what_tells_them_apart() -> None:
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.11.attention.self.value", "head"]
    assert shortened(names) == ["0.query", "11.value", "head"]
    assert shortened(["blocks.1", "blocks.1"]) == ["1", "1"]


def test_who_trained_which_unit_when(tmp_path: Path) -> None:
    """Client 0 is lost in round 2, where it held layer 0 (0 + 2 mod 2); client 2 held it as well."""
    crew = Crew(read_run(write_run(tmp_path / "run", reasons={2: ["node 7000: gone"]})))
    grid = units_grid(crew)
    assert grid is not None
    assert grid.head == ["unit", "round 1", "round 2"]
    assert grid.rows == [["layer.0.query", "1", "2"], ["layer.1.query", "0, 2", "1"], ["head", "0, 1, 2", "1, 2"]]
    assert {tip.tip for tip in grid.tips} >= {"round 2, layer.0.query: client 2", "round 1, head: clients 0, 1, 2"}
    assert {shade.means for shade in grid.shades} == {"1", "2", "3"}
    counts = clients_grid(crew)
    assert counts is not None
    assert counts.rows == [["0", "0", "1", "1"], ["1", "1", "1", "2"], ["2", "1", "1", "2"]]


def test_labels_are_drawn_where_the_server_knows_them_and_else_a_sentence_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    grid = labels_grid(read_run(run), Crew(read_run(run)))
    assert grid is not None
    assert grid.rows == [["0", "0", "10", "10"], ["1", "1", "9", "10"], ["2", "2", "8", "10"]]
    about = json.loads((run / "run.json").read_text())
    for node in about["nodes"]:
        del node["labels"]
    (run / "run.json").write_text(json.dumps(about))
    assert "Which labels a client holds is known to that client alone" in page(run).text


def test_the_page_says_what_it_gave_what_it_cost_and_what_was_not_default(tmp_path: Path) -> None:
    found = page(write_run(tmp_path / "run", config={"client.learning-rate": 0.05}))
    for said in ("10.0 % → 60.0 %", "60.0 % in round 2", "2 / 1", "20 s", "5.9 (8.4 with backprop)", "completed"):
        assert said in found.text
    assert ["client.learning-rate", "0.05", "0.01"] in found.rows
    assert ["seed", "0"] in found.rows
    assert ["spry", "0.1.0"] in found.rows
    assert "None: every client that was asked gave a reply that was used." in found.text


def test_failures_are_counted_by_their_reason_and_what_a_node_says_is_only_shown(tmp_path: Path) -> None:
    reasons = {1: [f"node 7000: {HOSTILE}"], 2: [f"node 7000: {HOSTILE}", "node 7001: no answer"]}
    found = page(write_run(tmp_path / "run", reasons=reasons))
    assert [HOSTILE, "2", "1 to 2", "0"] in found.rows
    assert ["no answer", "1", "2", "1"] in found.rows
    assert found.loads == []
    hostile = write_run(tmp_path / "b", config={"model.name": HOSTILE, "method": HOSTILE}, units=(HOSTILE, "x.y", "z"))
    assert page(hostile).loads == page(hostile, tmp_path / "run").loads == []


def test_a_run_that_chose_its_gradient_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "gradient.json").write_text('{"gradient": "backprop", "reason": "backprop: exact, for 3 MiB."}')
    assert 'gradient="auto" chose backprop: exact, for 3 MiB.' in page(run).text


def test_a_run_that_promises_privacy_names_no_client(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", config={"privacy.mode": "central"}, reasons={1: ["node 7000: gone"]})
    found = page(run)
    assert "This run promises privacy" in found.text
    assert ["gone", "1", "1", "one of the clients"] in found.rows
    assert "7000" not in found.text
    assert "layer.0.query" not in found.text


def test_a_run_that_is_going_on_was_killed_or_failed_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "accur')
    assert "it is still going, or was ended from outside, after round 2 of 2" in page(run).text
    about = json.loads((run / "run.json").read_text()) | {"failed": "No usable reply in 3 rounds"}
    (run / "run.json").write_text(json.dumps(about))
    assert "The run failed: No usable reply in 3 rounds" in page(run).text
    for name in ("config.json", "run.json", "assignments.jsonl"):
        (run / name).unlink()
    assert "10.0 % → 60.0 %" in page(run).text
    (run / "metrics.jsonl").unlink()
    (run / "config.json").write_text("{}")
    assert "No round has been evaluated or trained yet." in page(run).text


def test_numbers_that_are_none_or_infinite_leave_a_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", accuracy=(0.1, float("nan"), None, 0.5))
    assert [y for _, y in read_run(run).curve("accuracy")] == [0.1, 0.5]
    assert not re.search(r"=\"[^\"]*\bnan\b", render([run]))


def test_any_quality_of_metrics_jsonl_has_its_curve(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [LINE | {"round": r, "rounds": 1, "loss": 1.0, "f1": 0.5 + r / 4, "personalised-f1": 0.9} for r in (0, 1)]
    lines = [{name: value for name, value in line.items() if "accuracy" not in name} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main_quality([read_run(run)]) == "f1"
    found = page(run)
    assert "50.0 % → 75.0 %" in found.text
    assert ["round", "global model, held-out", "personalised, held-out"] in found.rows


def test_runs_side_by_side_at_equal_costs(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", accuracy=(0.1, 0.2, 0.3, 0.45), config={"method": "fedavg"})
    found = page(one, two)
    assert ["1 one", "spry-per-iteration", "60.0 %", "60.0 %", "2", "200", "3", "20 s", "5.9", "-"] in found.rows
    assert ["1 one", "2", "200", "3", "20 s"] in found.rows  # 0.6 is the first that is 0.45 or more
    assert ["2 two", "3", "300", "4.5", "30 s"] in found.rows
    assert ["method", "spry-per-iteration", "fedavg"] in found.rows
    assert ["1.5", "40.0 %", "20.0 %"] in found.rows  # over MiB both ways
    assert ["1 one", "not reached", "-", "-", "-"] in Page(render([one, two], target=0.7)).rows


@pytest.mark.parametrize("value", [1, 0.5, 1234.5, 1e-7, 12345678.0, 0])
def test_numbers_are_shown_to_three_digits_or_more(value: float) -> None:
    assert float(shown(value).replace(",", "")) == pytest.approx(value, rel=5e-3)


def test_spry_report_writes_a_file_and_refuses_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "one")
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert CliRunner().invoke(app, ["report", str(run), str(run), "--out", "both.html"]).exit_code == 0
    assert "2 runs side by side" in Path("both.html").read_text()
    assert not list(tmp_path.rglob("*.new"))
    for folder, sentence in (
        (
            "runs",
            "is not the folder of a run: it has neither metrics.jsonl nor config.json. There are runs in it: one.",
        ),
        ("absent", "absent is not a folder"),
    ):
        result = CliRunner().invoke(app, ["report", folder])
        assert result.exit_code == 2
        assert sentence in result.output
    (run / "metrics.jsonl").write_text("{}\nnonsense\n")
    with pytest.raises(SpryError, match=r"metrics\.jsonl, line 2 cannot be read"):
        read_run(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"round": 1, "noise": "much", "accuracy": 0.5}\n'),
        ("metrics.jsonl", '{"round": [], "reasons": 3}\n'),
        ("run.json", '{"nodes": [{"partition": 0}, 3], "units": ["a"], "versions": 3}'),
        ("run.json", "[]"),
        ("assignments.jsonl", '{"round": 1, "hands": 3}\n'),
        ("result.json", '{"rounds": 2, "warnings": 3}'),
    ],
)
def test_files_that_no_run_leaves_give_a_page_or_a_sentence(tmp_path: Path, name: str, text: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert (result.exit_code, result.exception and type(result.exception)) in ((0, None), (2, SystemExit))
    assert result.exit_code == 0 or str(run) in result.output


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_curves_stand_out_from_their_background(mode: str) -> None:
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if mode == "light" else dark))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    for ink, ground in (("ink", "card"), ("soft", "card"), ("soft", "page"), ("accent", "page"), ("warn-ink", "warn")):
        assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert all(contrast(f"c{number}", "card") >= 3 for number in range(6))
