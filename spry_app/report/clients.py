"""Who a run's clients were: their rows and labels, which units each trained when, and what went wrong with whom."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from spry_app.report.folder import Row, Run, number
from spry_app.report.grid import Cell, Grid, grid

_MOST_COLUMNS = 100
_MOST_TABLE_CELLS = 3000
_MOST_NAMED = 12
_NODE = re.compile(r"node (\d+): (.*)", re.DOTALL)
PRIVATE = "This run promises privacy, so nothing is kept of who took part, with which units, or with how many rows."
NOT_KEPT = "Who trained which units was not kept in this run's folder."
LABELS_UNKNOWN = (
    "Which labels a client holds is known to that client alone: nodes do not send it. (The server knows it in a "
    "simulation, where it can deal out the rows itself.)"
)


@dataclass(frozen=True)
class Hand:
    """Clients of a round with the same units and the same way to a gradient; used: those whose reply was. how: that way
    in words, empty where it was not kept. steps: local ones of each of the used.
    """

    round: int
    clients: list[str]
    used: list[str]
    units: list[str]
    how: str = ""
    steps: Mapping[str, int] = field(default_factory=dict)


class Crew:
    """The clients of a run by short names: numbers of partitions where those tell them apart, else of nodes."""

    def __init__(self, run: Run) -> None:
        nodes = run.about.get("nodes")
        self.nodes: list[Row] = [node for node in nodes if isinstance(node, dict)] if isinstance(nodes, list) else []
        parts = [node.get("partition", -1) for node in self.nodes]
        clear = len(set(parts)) == len(parts) and all(isinstance(part, int) and part >= 0 for part in parts)
        self.names = {str(n.get("node")): str(n["partition"]) if clear else f"node {n.get('node')}" for n in self.nodes}
        units = run.about.get("units")
        self.units = list(map(str, units)) if isinstance(units, list) else []
        self.private = bool(run.config.get("privacy.mode"))
        self.hands = [hand for line in run.assignments for hand in self._hands(line)]

    def name(self, node: object) -> str:
        """How the report calls a node."""
        return self.names.get(str(node), f"node {node}")

    def _hands(self, line: Row) -> Iterator[Hand]:
        for hand in line.get("hands", ()):
            used, steps = list(hand.get("used", ())), hand.get("steps", ())
            gradient, directions = hand.get("gradient", ""), number(hand.get("directions"))
            yield Hand(
                round=int(line.get("round", 0)),
                clients=[self.name(node) for node in hand.get("nodes", ())],
                used=[self.name(node) for node in hand.get("nodes", ()) if node in used],
                units=[self.units[unit] for unit in hand.get("units", ()) if 0 <= unit < len(self.units)],
                how=f"{gradient}, {directions:g} a batch" if gradient and directions else str(gradient),
                steps={self.name(node): int(number(done) or 0) for node, done in zip(used, steps, strict=False)},
            )

    def everyone(self) -> list[str]:
        """All clients that are known, in the order of their numbers."""
        names = dict.fromkeys([*self.names.values(), *(name for hand in self.hands for name in hand.clients)])
        return sorted(names, key=_place)


def labels_grid(run: Run, crew: Crew) -> Grid | None:
    """Training and held-out rows of each client by label; None where the server does not know them."""
    names = run.about.get("label-names") or []
    known = [node for node in crew.nodes if isinstance(node.get("labels"), list) and len(node["labels"]) == len(names)]
    if not names or not known:
        return None
    by_name = {crew.name(node["node"]): node for node in known}
    clients = [name for name in crew.everyone() if name in by_name]
    cells = [
        [
            Cell(number(count), f"client {client}: {count} rows of {label}", str(count))
            for label, count in zip(names, by_name[client]["labels"], strict=True)
        ]
        for client in clients
    ]
    table = [
        [client, *(cell.text for cell in line), _rows(by_name[client])]
        for client, line in zip(clients, cells, strict=True)
    ]
    return grid(
        "Rows of each label on each client",
        clients,
        [str(name) for name in names],
        cells,
        x_label="label",
        what="rows",
        corner="client",
        table=(["client", *map(str, names), "all rows"], table),
    )


def node_table(crew: Crew) -> tuple[list[str], list[list[str]]]:
    """What each node said of itself."""
    head = ["client", "node", "training rows", "held-out rows", "memory for a step", "computes on"]
    head += ["forward pass of an example", "free memory", "power", "gradients"]
    rows = []
    for node in crew.nodes:
        told = [str(node.get(key, "-")) for key in ("node", "examples", "heldout")]
        measured = [_stated(node, *column) for column in _NUMBERS]
        kinds = node.get("gradients")
        gradients = ", ".join(map(str, kinds)) if isinstance(kinds, list) else ""
        told += [measured[0], str(node.get("accelerator") or UNKNOWN), *measured[1:]]
        rows.append([crew.name(node.get("node")), *told, _power(node), gradients or UNKNOWN])
    return head, sorted(rows, key=lambda row: _place(row[0]))


UNKNOWN = "not stated"
_NUMBERS = (("memory-mib", "MiB"), ("forward-ms", "ms"), ("free-mib", "MiB"))


def _stated(node: Row, key: str, unit: str) -> str:
    value = number(node.get(key))
    return f"{value:.5g} {unit}" if value else UNKNOWN


def _power(node: Row) -> str:
    percent = number(node.get("battery-percent"))
    source = {True: "mains", False: "battery"}.get(node["plugged"]) if isinstance(node.get("plugged"), bool) else None
    limit = number(node.get("power-limit-w"))
    parts = [source, None if percent is None else f"{percent:.0f} %", None if not limit else f"at most {limit:.4g} W"]
    return ", ".join(part for part in parts if part) or UNKNOWN


def work_table(crew: Crew) -> tuple[list[str], list[list[str]]] | None:
    """With which gradient, and in how many steps, each client trained; None where that was not kept."""
    done: dict[tuple[str, str], list[Hand]] = defaultdict(list)
    for hand in crew.hands:
        for name in hand.used if hand.how else ():
            done[name, hand.how].append(hand)
    rows = []
    for (name, how), hands in sorted(done.items(), key=lambda item: (_place(item[0][0]), item[0][1])):
        steps = sorted(hand.steps[name] for hand in hands if name in hand.steps)
        told = "-" if not steps else str(steps[0]) if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
        units = {unit for hand in hands for unit in hand.units}
        rows.append([name, how, told, str(len(hands)), str(len(units))])
    head = ["client", "gradient, directions", "local steps a round", "rounds", "different units"]
    return (head, rows) if rows else None


def units_grid(crew: Crew) -> Grid | None:
    """Units over rounds: how many clients trained each, and which."""
    rounds = sorted({hand.round for hand in crew.hands})
    per_column = max(1, ceil(len(rounds) / _MOST_COLUMNS))
    columns = [rounds[place : place + per_column] for place in range(0, len(rounds), per_column)]
    who: dict[tuple[str, int], list[str]] = defaultdict(list)
    how = dict[tuple[str, int], str]()
    for hand in crew.hands:
        how |= {(name, hand.round): _how(hand, name) for name in hand.used}
        for unit in hand.units:
            who[unit, hand.round] += hand.used
    names = [str(column[0]) for column in columns]
    cells = [[_trained(unit, column, who, how) for column in columns] for unit in crew.units]
    what = "clients whose reply was used" if per_column == 1 else f"replies used in {per_column} rounds"
    return grid(
        "Who trained which units when",
        crew.units,
        names,
        cells,
        x_label="round" if per_column == 1 else f"round ({per_column} in a column)",
        what=what,
        corner="unit",
        table=_who_when(crew, rounds, who),
    )


def clients_grid(crew: Crew) -> Grid | None:
    """Clients over units: in how many rounds each trained each."""
    counts = Counter((name, unit) for hand in crew.hands for name in hand.used for unit in hand.units)
    clients = crew.everyone() if crew.hands else []
    cells = [
        [
            Cell(counts[name, unit], f"client {name} trained {unit} in {counts[name, unit]} rounds")
            for unit in crew.units
        ]
        for name in clients
    ]
    places = [str(place) for place in range(1, len(crew.units) + 1)]
    table = [[name, *(str(int(cell.value or 0)) for cell in line)] for name, line in zip(clients, cells, strict=True)]
    return grid(
        "In how many rounds each client trained each unit",
        clients,
        places,
        cells,
        x_label="unit, in the order of the chart before",
        what="rounds",
        corner="client",
        table=(["client", *crew.units], table),
    )


def failures(run: Run, crew: Crew) -> list[list[str]]:
    """Rows of a table, one a reason: the sentence, how often, in which rounds, of whom."""
    rounds: dict[str, list[int]] = defaultdict(list)
    whose: dict[str, dict[str, None]] = defaultdict(dict)
    for line in run.rounds:
        for said in line.get("reasons") or ():
            found = _NODE.match(str(said))
            node, sentence = (crew.name(found[1]), found[2]) if found else ("", str(said))
            rounds[sentence].append(int(number(line.get("round")) or 0))
            whose[sentence] |= {"one of the clients" if crew.private else node: None}
    often = sorted(rounds, key=lambda sentence: -len(rounds[sentence]))
    return [[s, str(len(rounds[s])), _span(sorted(set(rounds[s]))), _few(sorted(whose[s], key=_place))] for s in often]


def _how(hand: Hand, name: str) -> str:
    steps = f", {hand.steps[name]} steps" if name in hand.steps else ""
    return f" ({hand.how}{steps})" if hand.how else ""


def _trained(
    unit: str, column: Sequence[int], who: Mapping[tuple[str, int], list[str]], how: Mapping[tuple[str, int], str]
) -> Cell:
    """how: by client and round; told where the column is one round."""
    names = [name for round_ in column for name in who.get((unit, round_), ())]
    ways = [name + how.get((name, column[0]), "") for name in names] if len(column) == 1 else names
    told = ("clients " if len(names) > 1 else "client ") + _few(ways) if names else "nobody"
    single = len(column) == 1 and len(names) == 1 and names[0].isdigit()
    return Cell(len(names), f"{_span(column, 'round')}, {unit}: {told}", names[0] if single else "")


def _who_when(
    crew: Crew, rounds: Sequence[int], who: Mapping[tuple[str, int], list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Every round of every unit, or of each unit how often where that would be too long to read."""
    if len(rounds) * len(crew.units) <= _MOST_TABLE_CELLS:
        rows = [[unit, *(", ".join(who.get((unit, round_), ())) or "-" for round_ in rounds)] for unit in crew.units]
        return ["unit", *(f"round {round_}" for round_ in rounds)], rows
    rows = []
    for unit in crew.units:
        replies = [who.get((unit, round_), []) for round_ in rounds]
        everyone = {name for names in replies for name in names}
        rows.append([unit, str(sum(map(bool, replies))), str(sum(map(len, replies))), str(len(everyone))])
    return ["unit", "rounds in which it was trained", "replies used", "different clients"], rows


def _place(name: str) -> tuple[bool, int, str]:
    """Numbers in their order, before all else."""
    return not name.isdigit(), int(name) if name.isdigit() else 0, name


def _rows(node: Mapping[str, Any]) -> str:
    return str(sum(number(count) or 0 for count in node["labels"]).__trunc__())


def _span(rounds: Sequence[int], word: str = "") -> str:
    """As "3", "3 to 7", or with a word "round 3", "rounds 3 to 7"; "3, 7, 9" where they do not follow one another."""
    follow = list(rounds) == list(range(rounds[0], rounds[0] + len(rounds)))
    told = (
        str(rounds[0])
        if len(rounds) == 1
        else f"{rounds[0]} to {rounds[-1]}"
        if follow
        else _few(list(map(str, rounds)))
    )
    return f"{word}{'s' if len(rounds) > 1 else ''} {told}".strip() if word else told


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (
        f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    )
