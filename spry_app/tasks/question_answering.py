"""Extractive question answering, where a question may have no answer: columns, loss, best span, score. How a context
is cut into windows is in windows.py, how strings are compared in squad.py. Never a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from spry_app.autodiff.transfer import onto
from spry_app.config import DataConfig
from spry_app.errors import SpryError
from spry_app.tasks import squad
from spry_app.tasks.columns import dealt_by, missing_field, require, text, whole
from spry_app.tasks.encoded import IGNORED, Encoded
from spry_app.tasks.task import LearningTask, Model, Names, Sums, ratio, within
from spry_app.tasks.windows import Offsets, room_for_question, shortened, windows

_NOTHING = float("-inf")


class Asked(NamedTuple):
    """What a window's answer is made of and compared with. none: the token that stands for "no answer". longest:
    tokens that an answer may have.
    """

    offsets: Offsets
    none: int
    context: str
    answers: list[str]
    longest: int


class Said(NamedTuple):
    """What a model answers: its best span, that span's score, and the score of there being no answer. A score is the
    sum of a start logit and an end logit.
    """

    text: str
    score: float
    none: float

    def beside(self, other: "Said") -> "Said":
        """Both as one, of two windows of a question."""
        best = max(self, other, key=lambda said: said.score)
        return best._replace(none=min(self.none, other.none))


def _columns(raw: Dataset, config: DataConfig, _names: Names, where: str) -> dict[str, Any]:
    """question, context; answers and answer_start, lists that are empty where a question has none; label where rows are
    to be dealt out by it.
    """
    question, context = config.question_field, config.context_field
    require(raw, {"data.question-field": question, "data.context-field": context}, where)
    columns = {
        "question": text(raw, "data.question-field", question, where),
        "context": text(raw, "data.context-field", context, where),
        "answers": _lists(raw, config, "text", pa.types.is_string, where),
        "answer_start": _lists(raw, config, "answer_start", pa.types.is_integer, where),
    }
    rows = zip(*(column.to_pylist() for column in columns.values()), strict=True)
    for number, row in enumerate(rows, start=1):
        problem = _problem(*row)
        if problem:
            raise SpryError(f"{problem} in row {number} of {where}.")
    return columns | dealt_by(raw, config)


def _lists(
    raw: Dataset, config: DataConfig, name: str, holds: Callable[[pa.DataType], bool], where: str
) -> pa.ChunkedArray:
    """The lists of this name in the column of answers."""
    field = f"{config.answer_field or 'answers'}.{name}"
    wanted = f"data.answer-field is {config.answer_field!r}, so that there must be a column {field!r} of lists"
    if field not in raw.column_names:
        raise SpryError(f"{wanted}, but {where} has {missing_field(field, raw.column_names)}")
    column = whole(raw, "data.answer-field", field, where)
    inner = column.type.value_type if pa.types.is_list(column.type) else None
    if inner is None or not (holds(inner) or pa.types.is_null(inner)):
        raise SpryError(f"{wanted} as SQuAD has them, but in {where} it holds {raw.features[field]}.")
    return column


def _problem(question: str, context: str, answers: list[str], starts: list[int]) -> str:
    """Why a row will not do; empty where it does."""
    if not question.strip():
        return "data.question-field is empty"
    if None in answers or None in starts:
        return "data.answer-field has a list with a gap"
    if len(answers) != len(starts):
        return f"data.answer-field has {len(answers)} texts and {len(starts)} first characters"
    for answer, start in zip(answers, starts, strict=True):
        if not answer.strip():
            return "data.answer-field has an answer without text (a question without one has empty lists)"
        found = context[start : start + len(answer)] if start >= 0 else ""
        if found != answer:
            return f"data.answer-field has {answer!r} at character {start} of the context, where there is {found!r},"
    return ""


def _encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, _training: bool) -> Encoded:
    """Windows, labelled with the first of the answers.

    cut: questions that were shortened, and those whose answer no window holds, which are learned as if they had none.
    """
    most = room_for_question(tokenizer, config.max_length, config.stride)
    asked, contexts, answers = (dataset[name][:] for name in ("question", "context", "answers"))
    questions = shortened(asked, tokenizer, most)
    first = [(at[0], of[0]) if at else None for at, of in zip(dataset["answer_start"][:], answers, strict=True)]
    found = list(windows(questions, contexts, first, tokenizer, config.max_length, config.stride))
    held = {window.question for window in found if window.start != window.none}
    lost = {number for number, answer in enumerate(first) if answer} - held
    cut = {number for number, (now, whole) in enumerate(zip(questions, asked, strict=True)) if now != whole}
    return Encoded(
        features={name: [window.features[name] for window in found] for name in (found[0].features if found else ())},
        targets={
            "start": [_one(window.start, window.offsets) for window in found],
            "end": [_one(window.end, window.offsets) for window in found],
        },
        cut=len(cut | lost),
        tokenizer=tokenizer,
        task=QUESTION_ANSWERING,
        kept=[
            Asked(
                window.offsets,
                window.none,
                contexts[window.question],
                answers[window.question],
                config.max_answer_length,
            )
            for window in found
        ],
        together=[window.question for window in found],
    )


def _one(token: int, offsets: Offsets) -> list[int]:
    """1 at this token, 0 at all others of its window."""
    return [int(place == token) for place in range(len(offsets))]


def loss(logits: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of start and end over all tokens of a window but padding, float32.

    Shapes: (windows, tokens, 2); (windows, tokens), 1 at the right token, 0 at the others, IGNORED at padding. As
    transformers' heads have it where nothing is padded; theirs depends on how long the other rows of a batch are.
    """
    both = torch.stack([onto(targets[name], logits.device) for name in ("start", "end")], -1)
    scores = logits.float().masked_fill(both == IGNORED, _NOTHING)
    return cross_entropy(scores.transpose(1, 2).flatten(0, 1), both.transpose(1, 2).flatten(0, 1).argmax(-1))


def best_spans(scores: Tensor, inside: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start, end and score of the best span of at most `longest` tokens, each (windows,): the best of all spans, not of
    those between the n best starts and ends.

    scores: start and end logits, (windows, tokens, 2). inside: where a span may lie, (windows, tokens), in one piece a
    window; the score is -inf where there is no such token.
    """
    starts, ends = scores.masked_fill(~inside.unsqueeze(-1), _NOTHING).unbind(-1)
    reach = min(longest, scores.shape[1])
    ahead, by = pad(ends, (0, reach - 1), value=_NOTHING).unfold(1, reach, 1).max(-1)
    score, start = (starts + ahead).max(-1)
    return start, start + by.gather(1, start[:, None]).squeeze(1), score


def said(rows: Encoded, part: Sequence[int], logits: Tensor) -> Iterator[Said]:
    """What these windows say, by their logits (windows, tokens, 2)."""
    scores, here = logits.float().cpu(), rows.aims(part)["start"] != IGNORED
    inside, asked = torch.zeros_like(here), [rows.kept[index] for index in part]
    inside[here] = torch.cat([torch.from_numpy(window.offsets[:, 0] >= 0) for window in asked])
    first = here.int().argmax(-1).tolist()
    best = zip(*(each.tolist() for each in best_spans(scores, inside, asked[0].longest)), strict=True)
    for row, (window, (start, end, score)) in enumerate(zip(asked, best, strict=True)):
        begin, stop = window.offsets[start - first[row], 0], window.offsets[end - first[row], 1]
        none = float(scores[row, first[row] + window.none].sum())
        yield Said(window.context[begin:stop], score, none)


def answers(rows: Encoded, part: Sequence[int], logits: Tensor) -> dict[int, str]:
    """Question -> its answer: the best span of its windows, or "" where "no answer" scores higher in each of them."""
    found: dict[int, Said] = {}
    for index, one in zip(part, said(rows, part, logits), strict=True):
        question = rows.together[index]
        found[question] = one.beside(found.get(question, one))
    return {question: "" if one.none > one.score else one.text for question, one in found.items()}


def _loss(model: Model, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    return loss(model.logits(inputs), targets)


@torch.no_grad()
def _judge(model: Model, rows: Encoded, part: Sequence[int]) -> Sums:
    logits = model.logits(rows.inputs(part))
    found = answers(rows, part, logits)
    wanted = {rows.together[index]: rows.kept[index].answers for index in part}
    sums = {"loss": loss(logits, rows.aims(part)).item() * len(part), "examples": len(part)}
    return sums | squad.totals(found.values(), (wanted[question] for question in found))


QUESTION_ANSWERING = LearningTask(
    noun="question-answering",
    auto_model=AutoModelForQuestionAnswering,
    peft_type="QUESTION_ANS",
    hub_task="question-answering",
    keys=frozenset({"question-field", "context-field", "answer-field", "label-field", "stride", "max-answer-length"}),
    columns=_columns,
    encode=_encode,
    loss=_loss,
    judge=_judge,
    sums=dict.fromkeys(squad.totals((), ()), (0, 1)),
    metrics={
        "exact": ratio("exact", "questions"),
        "f1": ratio("f1", "questions"),
        "answerable-exact": ratio("answerable-exact", "answerable-questions"),
        "answerable-f1": ratio("answerable-f1", "answerable-questions"),
        "unanswerable-exact": lambda sums: within(
            (sums["exact"] - sums["answerable-exact"]) / (sums["questions"] - sums["answerable-questions"])
        ),
    },
    main_metric="f1",
    names=lambda _config: ("start", "end"),  # two numbers for each token
)
"""The loss is a mean over windows, the metrics are over questions."""
