"""The embedded set: that it is big, deterministic, fair and non-IID. Whether a model learns it is not asked here."""

import hashlib
import time
from collections import Counter
from random import Random

import pytest

from spry_app.data import grammar, household
from spry_app.data.household import HOUSEHOLDS, INTENTS, NEWCOMERS, TEST_ROWS, Utterance, utterances

DIGEST = "13ff30c24543db02b71dedd3fff8e5c1a63578c877769e03f403a179e6b78af3"


def digest(rows: tuple[Utterance, ...]) -> str:
    return hashlib.sha256("\n".join(f"{row.household}\t{row.label}\t{row.text}" for row in rows).encode()).hexdigest()


def test_the_set_has_the_promised_sizes() -> None:
    train, test = utterances()
    assert len(INTENTS) == 12
    assert len(train) > 5000 and len({row.text for row in train}) > 5000
    assert len(test) == TEST_ROWS
    assert len({row.household for row in train}) == HOUSEHOLDS


def test_every_intent_is_common_enough_to_learn_and_to_test() -> None:
    for rows in utterances():
        counts = Counter(row.label for row in rows)
        assert set(counts) == set(range(len(INTENTS)))
        assert min(counts.values()) > len(rows) / len(INTENTS) / 2


def test_no_test_text_was_trained_on_and_some_households_are_new() -> None:
    train, test = utterances()
    assert not {row.text for row in train} & {row.text for row in test}
    new = {row.household for row in test} - {row.household for row in train}
    assert NEWCOMERS / 2 < len(new) <= NEWCOMERS


def test_utterances_are_short_lines_of_plain_words_with_nothing_left_in_braces() -> None:
    for row in (row for rows in utterances() for row in rows):
        assert row.text == " ".join(row.text.split()) and row.text.isascii()
        assert not set(row.text) & set("{}|")
        assert 1 <= len(row.text.split()) <= 40


def test_the_same_text_never_has_two_labels_unless_a_typo_ate_the_difference() -> None:
    labels: dict[str, set[int]] = {}
    for row in (row for rows in utterances() for row in rows):
        labels.setdefault(row.text, set()).add(row.label)
    assert sum(len(found) > 1 for found in labels.values()) <= 3


def test_the_set_is_the_same_on_every_machine_and_python() -> None:
    train, test = utterances()
    assert digest(train + test) == DIGEST


def test_the_set_is_made_quickly_and_once() -> None:
    utterances.cache_clear()
    start = time.process_time()
    first = utterances()
    assert time.process_time() - start < 0.5
    assert utterances() is first


def test_households_ask_for_different_things() -> None:
    """Mean total variation distance between a household's labels and all labels, against the same with labels shuffled.

    A household has 10 to 30 rows of 12 intents, so even equal habits would be some way off: the shuffled rows say how
    far. Five standard errors of the mean over 300 households are below 0.04.
    """
    train, _ = utterances()
    labels = [row.label for row in train]
    shuffled = labels.copy()
    Random(0).shuffle(shuffled)
    homes = [row.household for row in train]
    assert distance(homes, labels) > distance(homes, shuffled) + 0.15


def distance(homes: list[str], labels: list[int]) -> float:
    overall = Counter(labels)
    apart = []
    for home in sorted(set(homes)):
        own = Counter(label for label, of in zip(labels, homes, strict=True) if of == home)
        apart.append(sum(abs(own[i] / own.total() - overall[i] / overall.total()) for i in overall) / 2)
    return sum(apart) / len(apart)


def test_households_differ_in_words_and_politeness() -> None:
    train, _ = utterances()
    polite = Counter(row.household for row in train if row.text.endswith(grammar.CLOSERS))
    kitchens = Counter(row.household for row in train if "kitchen" in row.text)
    rates = [polite[home] / rows for home, rows in Counter(row.household for row in train).items()]
    assert min(rates) < 0.1 and max(rates) > 0.5
    assert len(kitchens) < HOUSEHOLDS / 2


@pytest.mark.parametrize("intent", grammar.ASKS)
def test_every_request_fits_behind_a_negation_and_a_hint_exists(intent: str) -> None:
    assert intent in grammar.HINTS
    assert intent.split("_")[0] in grammar.SETTLED
    assert all(not ask.startswith(("i ", "is ", "are ", "it's ")) for ask in grammar.ASKS[intent])


def test_a_typo_changes_little() -> None:
    for word in ("a", "to", "kitchen"):
        for seed in range(50):
            typed = household._typo(Random(seed), word)
            assert abs(len(typed) - len(word)) <= 1 and set(typed) <= set(word)
