"""How an answer is scored against those of people, as SQuAD does (arXiv 1606.05250, and 1806.03822 for questions that
have none). Strings in, numbers out; where answers come from is not known here.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
"""ASCII's alone goes: a dash or quotation mark of Unicode is part of its word, in the official rules too."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, then without articles, words apart by one space.

    In this order: "The-end" becomes "theend", in which there is no article left to take away.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> bool:
    """Whether nothing is left between them once both are normalised."""
    return normalised(prediction) == normalised(answer)


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of both, each as often as it is there.

    Where one has no words it is 1 if the other has none either, else 0.
    """
    said, wanted = normalised(prediction).split(), normalised(answer).split()
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (Counter(said) & Counter(wanted)).total() / (len(said) + len(wanted))


def score(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1, each against the answer that it is best for.

    Answers of which nothing is left once normalised do not count; without any that does, "" is the one answer.
    """
    wanted = [answer for answer in answers if normalised(answer)] or [""]
    exact = max(exact_match(prediction, answer) for answer in wanted)
    return float(exact), max(token_f1(prediction, answer) for answer in wanted)


def totals(predictions: Iterable[str], answers: Iterable[Sequence[str]]) -> dict[str, float]:
    """Sums over questions: "exact", "f1" and "questions"; the same of those that have an answer ("answerable-exact",
    ...); those of the rest are the differences. A question has an answer if somebody gave one, whatever is left of it
    once normalised.
    """
    names = ("exact", "f1", "questions")
    found = dict.fromkeys((*names, *(f"answerable-{name}" for name in names)), 0.0)
    for prediction, wanted in zip(predictions, answers, strict=True):
        for name, value in zip(names, (*score(prediction, wanted), 1.0), strict=True):
            found[name] += value
            found[f"answerable-{name}"] += value if wanted else 0.0
    return found
