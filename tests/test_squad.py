"""An answer's score by the official rules of SQuAD v2: edge cases, worked out by hand."""

from fractions import Fraction

import pytest

from spry_app.tasks.squad import exact_match, normalised, score, token_f1, totals


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The  Great\tWall\n", "great wall"),
        ("U.S.A.", "usa"),  # punctuation goes without leaving a space
        ("state-of-the-art", "stateoftheart"),  # and before articles, so this "the" is no word any more
        ("the-end", "theend"),
        ("Anna's theatre at another place", "annas theatre at another place"),  # "an", "the" inside words stay
        ("A an THE", ""),
        ("?!", ""),
        ("", ""),
        ("$1,000.50", "100050"),
        # Unicode quotation marks stay, but end a word: the article between them goes, its space does not.
        ("\u201cThe end\u201d", "\u201c end\u201d"),
        ("1939\u201345", "1939\u201345"),  # so does an en dash
        ("l\u2019an 2000", "l\u2019 2000"),  # an article in any language
        ("Äpfel\u00a0und Birnen", "äpfel und birnen"),  # a no-break space is a space
        ("the\u0301", "\u0301"),  # a combining accent ends a word for `re`: "the" before it is an article
        ("a_b", "ab"),  # an underscore is punctuation
    ],
)
def test_a_text_is_normalised_in_the_official_order(text: str, left: str) -> None:
    assert normalised(text) == left


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("the cat sat", "cat", Fraction(2, 3)),  # words {cat, sat}, {cat}: P = 1/2, R = 1
        ("cat", "The cat sat.", Fraction(2, 3)),  # P = 1, R = 1/2
        ("dog", "cat", Fraction(0)),
        ("red red red", "red blue", Fraction(2, 5)),  # one "red" in common: P = 1/3, R = 1/2
        ("red red blue", "red red", Fraction(4, 5)),  # two: P = 2/3, R = 1
        ("b a c", "c b", Fraction(1)),  # "a" is an article; order does not count
        ("", "", Fraction(1)),
        ("the", "", Fraction(1)),  # no words on either side
        ("", "cat", Fraction(0)),
        ("the", "cat", Fraction(0)),
        ("cat", "", Fraction(0)),
    ],
)
def test_f1_is_of_the_words_with_their_counts(prediction: str, answer: str, f1: Fraction) -> None:
    assert token_f1(prediction, answer) == pytest.approx(float(f1), abs=1e-12)


def test_an_exact_match_is_of_all_that_is_left_in_its_order() -> None:
    assert exact_match("The U.S.", "us") and exact_match("an", "!")
    assert not exact_match("cat dog", "dog cat")


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        # Each number has its own best answer: exact with none, F1 of 4/5 with the second.
        ("red red blue", ["blue", "red red"], 0, Fraction(4, 5)),
        ("in 1939", ["1945", "1939", "in 1939"], 1, Fraction(1)),
        ("", [], 1, Fraction(1)),  # no answer, and none given
        ("a", [], 1, Fraction(1)),  # an article alone is none
        ("1939", [], 0, Fraction(0)),
        ("", ["1939", "1945"], 0, Fraction(0)),
        # An answer of articles alone does not count: the empty prediction does not match it ...
        ("", ["the", "1939"], 0, Fraction(0)),
        # ... unless there is no other.
        ("", ["the", "?"], 1, Fraction(1)),
        ("1939", ["the"], 0, Fraction(0)),
    ],
)
def test_a_question_counts_for_its_best_answer(prediction: str, answers: list[str], exact: int, f1: Fraction) -> None:
    assert score(prediction, answers) == (exact, pytest.approx(float(f1), abs=1e-12))


def test_totals_are_sums_over_all_questions_and_over_those_that_have_an_answer() -> None:
    """By question: (0, 2/3), (1, 1), (0, 0), (1, 1): the last has an answer, of which normalising leaves nothing."""
    predictions = ["the cat sat", "", "dog", ""]
    found = totals(predictions, [["cat"], [], [], ["the"]])
    assert found == {
        "exact": 2,
        "f1": pytest.approx(2 / 3 + 2),
        "questions": 4,
        "answerable-exact": 1,
        "answerable-f1": pytest.approx(2 / 3 + 1),
        "answerable-questions": 2,
    }
    with pytest.raises(ValueError):
        totals(["one"], [])
