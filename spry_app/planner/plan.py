"""A plan: every way predicted within the memory of a device, and one of them advised."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from spry_app.autodiff.budget import SMALLEST, DoesNotFit, Slices, fit, halved
from spry_app.autodiff.memory import MIB
from spry_app.autodiff.slopes import forward_mode
from spry_app.client.slicing import AUTO_PART, rows_as_set
from spry_app.config import RunConfig, Scalar
from spry_app.errors import SpryError
from spry_app.methods.replay import local_steps
from spry_app.models import NoPrefixError
from spry_app.models.checkpoint import find_device
from spry_app.models.room import free_bytes
from spry_app.planner.advice import Advice, advise
from spry_app.planner.blank import model_of
from spry_app.planner.predict import Predictor
from spry_app.planner.rows import Row
from spry_app.planner.speed import forward_ms
from spry_app.planner.ways import HANDS, Way, ways

MOST_EXAMPLES = 1024
LONGER = 4
"""How far beyond data.max-length longer texts are tried."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """memory_mib: free on the device for weights and training; None for what is free here. forward_ms: of a pass of one
    example, None to measure it here. nodes: that are connected. rows: of one of them, where it trains in whole passes.
    hands: whose units are compared (ways.HANDS). limits: whether the largest batch and length are searched for.
    """

    memory_mib: float | None = None
    forward_ms: float | None = None
    nodes: int = 10
    rows: int = 100
    hands: tuple[str, ...] = tuple(HANDS)
    limits: bool = True


@dataclass(frozen=True)
class Plan:
    """length: tokens of each example. forward_ms: None where it is not known; measured: whether it was, here."""

    model: str
    device: str
    memory_mib: float
    length: int
    forward_ms: float | None
    measured: bool
    rows: tuple[Row, ...]
    advice: Advice


def plan(config: RunConfig, asked: Asked, progress: Progress = lambda _: None) -> Plan:
    """Raises SpryError where there is no such model or run."""
    device = _device(config, asked)
    adapted = model_of(config)
    predictor = Predictor(adapted, host=device.type == "cpu")
    memory = free_bytes(device) / MIB if asked.memory_mib is None else asked.memory_mib
    length, at_once = predictor.length(config), min(config.client.micro_batch or 8, config.most_rows_at_once)
    milliseconds = asked.forward_ms
    if milliseconds is None and device == find_device("auto"):
        progress("a forward pass here")
        milliseconds = forward_ms(config, len(adapted.blocks), at_once, length, device)
    clients = clients_of(config, asked)
    desk = Desk(predictor, memory, milliseconds, clients, asked)
    rows = tuple(rows_of(desk, ways(config, adapted, clients, asked.hands), progress))
    measured = asked.forward_ms is None and milliseconds is not None
    return Plan(config.model.name, str(device), memory, length, milliseconds, measured, rows, advise(rows, memory))


def _device(config: RunConfig, asked: Asked) -> torch.device:
    """Another box may have a GPU where this one has none."""
    if asked.memory_mib is not None and config.model.device.startswith("cuda"):
        return torch.device("cuda", 0)
    return find_device(config.model.device)


@dataclass(frozen=True)
class Desk:
    """What all rows of a plan share."""

    predictor: Predictor
    memory_mib: float
    forward_ms: float | None
    clients: int
    asked: Asked


def clients_of(config: RunConfig, asked: Asked) -> int:
    """Of a round."""
    return min(asked.nodes, max(config.server.min_train_nodes, round(config.server.fraction_train * asked.nodes)))


def rows_of(desk: Desk, found: Iterator[Way], progress: Progress = lambda _: None) -> Iterator[Row]:
    """One a way, also where it is not possible. The largest batch and length are those of the hand that comes first."""
    own = ""
    for way in found:
        own = own or way.hand
        progress(f"{way.name}, {way.hand} units")
        try:
            yield _row(desk, way, desk.asked.limits and way.hand == own)
        except (SpryError, NotImplementedError, NoPrefixError) as error:
            yield Row(gradient=way.name, hand=way.hand, keys=way.keys, error=str(error))


def _row(desk: Desk, way: Way, limits: bool) -> Row:
    predictor, client = desk.predictor, way.config.client
    slices, fits = _slices(desk, way)
    memory = predictor.memory(way, slices)
    sent = predictor.bytes(way, slices, desk.clients)
    forwards = predictor.forwards(way, slices)
    steps = local_steps(way.method, client) or client.local_epochs * math.ceil(desk.asked.rows / client.batch_size)
    seconds = None if desk.forward_ms is None else forwards * desk.forward_ms / 1e3
    perturbed = predictor.perturbed(way)
    named = way.method.gradient.name if way.name == "as set" else way.name
    return Row(
        gradient=named if way.name != "as set" else f"{way.name}: {named}",
        hand=way.hand,
        keys=way.keys | _slice_keys(way, slices),
        fits=fits,
        examples_at_once=slices.micro_batch,
        directions_at_once=slices.directions_at_once if _shares(way) else 0,
        workspace_kib=slices.workspace_bytes >> 10,
        **{f"{name}_mib": value for name, value in dataclasses.asdict(memory).items()},
        total_mib=memory.total,
        forwards=forwards,
        step_s=seconds,
        steps=steps,
        round_s=None if seconds is None else seconds * steps,
        up_bytes=sent.up,
        down_bytes=sent.down,
        directions=client.directions if perturbed else 0,
        directions_kind=way.method.directions,
        perturbed=perturbed,
        holders=max(1, desk.clients * len(way.units) // len(predictor.adapted.units)),
        most_examples=_most_examples(desk, way, slices) if limits and fits else 0,
        most_tokens=_most_tokens(desk, way, slices) if limits and fits else 0,
    )


def _slice_keys(way: Way, slices: Slices) -> dict[str, Scalar]:
    """What a run must set to cut its steps so; nothing where it does by itself."""
    if way.config.client.memory_budget_mib or slices.micro_batch == _as_set(way).micro_batch:
        return {}
    return {"client.micro-batch": slices.micro_batch}


def _as_set(way: Way) -> Slices:
    client = way.config.client
    shared = min(client.directions_at_once, client.directions) if _shares(way) else 1
    return Slices(rows_as_set(way.config), shared)


def _shares(way: Way) -> bool:
    """Whether directions may share a pass."""
    return way.method.gradient.slopes is forward_mode


def _slices(desk: Desk, way: Way) -> tuple[Slices, bool]:
    """As the run sets them; where those do not fit, or it has a budget, the largest that do. And whether they fit."""
    predictor, budgeted = desk.predictor, bool(way.config.client.memory_budget_mib)
    limit, of_step = _limit(desk, way)
    as_set = _as_set(way)

    def peak(slices: Slices) -> float:
        return predictor.peaks(way, slices)[of_step]

    def trial(slices: Slices) -> float:
        return predictor.first_two(way, slices)[of_step]

    if not budgeted and peak(as_set) <= limit:
        return as_set, True
    try:
        rows = way.config.most_rows_at_once if budgeted else as_set.micro_batch
        at_once = way.config.client.directions if budgeted and _shares(way) else as_set.directions_at_once
        chosen = fit(trial, rows, at_once, limit)
    except DoesNotFit:
        return SMALLEST, False
    while peak(chosen) > limit and chosen != SMALLEST:
        chosen = halved(chosen)
    return chosen, peak(chosen) <= limit


def _limit(desk: Desk, way: Way) -> tuple[float, int]:
    """MiB above the model that may be taken, and by what: 0 the whole task, 1 its step alone."""
    room = desk.memory_mib - desk.predictor.weights_mib
    budget = way.config.client.memory_budget_mib
    stated = AUTO_PART * room if budget == "auto" else float(budget or math.inf)
    return (stated, 1) if stated < room else (room, 0)


def _most_examples(desk: Desk, way: Way, slices: Slices) -> int:
    limit, of_step = _limit(desk, way)
    length = desk.predictor.length(way.config)

    def peak(rows: int) -> float:
        return desk.predictor.alone(way, dataclasses.replace(slices, micro_batch=rows), length)[of_step]

    return _furthest(peak, slices.micro_batch, MOST_EXAMPLES, limit)


def _most_tokens(desk: Desk, way: Way, slices: Slices) -> int:
    limit, of_step = _limit(desk, way)
    length = desk.predictor.length(way.config)
    one = dataclasses.replace(slices, micro_batch=1)
    most = min(LONGER * length, desk.predictor.places or LONGER * length)
    return _furthest(lambda tokens: desk.predictor.alone(way, one, tokens)[of_step], length, most, limit)


def _furthest(peak: Callable[[int], float], start: int, most: int, limit: float) -> int:
    """The largest n found from `start`, which fits, to `most`: where the line through two of them meets the limit."""
    fits, takes = start, peak(start)
    trial = min(2 * start, most)
    for _ in range(3):
        if trial <= fits:
            break
        would = peak(trial)
        slope = max((would - takes) / (trial - fits), 1e-9)
        end = fits + math.floor((limit - takes) / slope)
        if would <= limit:
            fits, takes = trial, would
        else:
            most = trial - 1
        trial = min(end, most)
    return fits
