"""The embedded data set: spoken smart-home requests of several hundred households. Drawn here, stored nowhere.

Every household has habits of its own: what it asks for, its words for rooms and things, how tangled and how polite it
speaks, how well it is transcribed. Draws use nothing but `Random.random`, which is the same everywhere.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TypeVar

from spry_app.data import grammar
from spry_app.data.grammar import Rules

HOUSEHOLDS = 300
NEWCOMERS = 50
"""Households that only the test set has heard."""
TEST_ROWS = 1000
INTENTS = (*grammar.ASKS, *grammar.FRAMES)

T = TypeVar("T")
_SEED = 2405_15551


@dataclass(frozen=True)
class Utterance:
    text: str
    label: int
    household: str


@dataclass(frozen=True)
class Household:
    """Habits; rates are probabilities, of an utterance or (typos) of a word."""

    name: str
    appetite: tuple[float, ...]
    words: Rules
    tangled: float
    hinting: float
    opening: float
    closing: float
    typos: float
    commas: bool


@cache
def utterances() -> tuple[tuple[Utterance, ...], tuple[Utterance, ...]]:
    """Training and test utterances; no text is in both, and the test set has households of its own."""
    rng = Random(_SEED)
    homes = [_household(rng, index) for index in range(HOUSEHOLDS + NEWCOMERS)]
    train = tuple(_utterance(rng, home) for home in homes[:HOUSEHOLDS] for _ in range(10 + int(21 * rng.random())))
    seen = {row.text for row in train}
    test: list[Utterance] = []
    while len(test) < TEST_ROWS:
        row = _utterance(rng, _pick(rng, homes))
        if row.text not in seen:
            test.append(row)
    return train, tuple(test)


def _household(rng: Random, index: int) -> Household:
    return Household(
        name=f"household-{index:03d}",
        appetite=tuple(rng.random() * rng.random() * rng.random() for _ in INTENTS),
        words={slot: tuple(_pick(rng, words) for _ in range(4)) for slot, words in grammar.WORDS.items()},
        tangled=0.25 * rng.random(),
        hinting=0.3 * rng.random(),
        opening=0.6 * rng.random(),
        closing=0.6 * rng.random(),
        typos=0.05 * rng.random() * rng.random(),
        commas=rng.random() < 0.5,
    )


def _utterance(rng: Random, home: Household) -> Utterance:
    intent = _weighted(rng, INTENTS, home.appetite)
    text = _say(rng, _request(rng, home, intent), home.words)
    if rng.random() < home.opening:
        text = f"{_pick(rng, grammar.OPENERS)}, {text}"
    if rng.random() < home.closing:
        text = f"{text}, {_pick(rng, grammar.CLOSERS)}"
    if not home.commas:
        text = text.replace(",", "")
    words = [_typo(rng, word) if rng.random() < home.typos else word for word in text.split()]
    return Utterance(" ".join(words), INTENTS.index(intent), home.name)


def _request(rng: Random, home: Household, intent: str) -> str:
    """A sentence for an intent, words still in braces."""
    other = _pick(rng, [name for name in grammar.ASKS if name != intent])
    devices = {intent.split("_")[0], other.split("_")[0]}
    settled = _pick(rng, [device for device in grammar.SETTLED if device not in devices])
    parts = {"do": grammar.ASKS.get(intent, ()), "other": grammar.ASKS[other], "settled": grammar.SETTLED[settled]}
    plain, tangled = grammar.FRAMES.get(intent, (grammar.PLAIN, grammar.TANGLED))
    if rng.random() < home.hinting:
        plain = grammar.HINTS.get(intent, plain)
    frames = tangled if rng.random() < home.tangled else plain
    return re.sub(r"{(do|other|settled)}", lambda name: _pick(rng, parts[name[1]]), _pick(rng, frames))


def _say(rng: Random, sentence: str, words: Rules) -> str:
    return re.sub(r"{(\w+)}", lambda name: _pick(rng, words[name[1]]), sentence)


def _typo(rng: Random, word: str) -> str:
    """Drop, double or swap a letter; a word of one or two letters stays."""
    if len(word) < 3:
        return word
    at = int(rng.random() * (len(word) - 1))
    head, pair, tail = word[:at], word[at : at + 2], word[at + 2 :]
    return head + _pick(rng, (pair[1:], pair[:1] + pair, pair[::-1])) + tail


def _pick(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _weighted(rng: Random, options: Sequence[str], weights: Sequence[float]) -> str:
    left = rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        left -= weight
        if left < 0:
            return option
    return options[-1]
