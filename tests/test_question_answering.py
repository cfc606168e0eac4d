"""Question answering as tensors: windows, the loss, the best span, no answer. A token is a word, so that references
are lists of words.
"""

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from questions import CLS, PAIRS, SEP, some_questions, word_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from spry_app.config import DataConfig
from spry_app.errors import SpryError
from spry_app.tasks import TASKS, Encoded
from spry_app.tasks.question_answering import answers, best_spans, loss
from spry_app.tasks.windows import shortened

TASK = TASKS["question-answering"]
Row = dict[str, Any]


def encoded(rows: list[Row], tokenizer: PreTrainedTokenizerFast | None = None, **keys: Any) -> Encoded:
    config = DataConfig(task="question-answering", partition="iid", **{"max_length": 24, "stride": 5, **keys})
    flat = Dataset.from_list(rows).flatten()
    return TASK.encode(
        Dataset.from_dict(dict(TASK.columns(flat, config, (), "here"))), tokenizer or word_tokenizer(), config, True
    )


def asked(context: str, question: str, *found: tuple[str, int]) -> Row:
    return {
        "context": context,
        "question": question,
        "answers": {"text": [text for text, _ in found], "answer_start": [at for _, at in found]},
    }


def reference_windows(row: Row, size: int, shared: int) -> list[tuple[list[str], tuple[int, int]]]:
    """(question, context part) as words, and the words of the answer among [CLS] question [SEP] part [SEP]: by hand,
    from words alone.
    """
    question, context = row["question"].split(), row["context"].split()
    room = size - len(question) - 3
    found, start = [], 0
    while True:
        part = context[start : start + room]
        place = (0, 0)
        if row["answers"]["text"]:
            first = row["context"][: row["answers"]["answer_start"][0]].count(" ")
            last = first + len(row["answers"]["text"][0].split()) - 1
            if start <= first and last < start + len(part):
                place = tuple(len(question) + 2 + word - start for word in (first, last))
        found.append((["[CLS]", *question, "[SEP]", *part, "[SEP]"], place))
        if start + room >= len(context):
            return found
        start += room - shared


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_windows_and_their_labels_are_those_of_a_walk_over_the_words(padding_side: str) -> None:
    rows, tokenizer = some_questions(60), word_tokenizer(padding_side=padding_side)
    found = encoded(rows, tokenizer)
    wanted = [(number, *each) for number, row in enumerate(rows) for each in reference_windows(row, 24, 5)]
    assert len(found) == len(wanted) > 100 and found.cut == 0
    assert found.together == [number for number, _, _ in wanted]
    batch, longest = found.batch(range(len(found))), max(len(words) for _, words, _ in wanted)
    for window, (_, words, (start, end)) in enumerate(wanted):
        shift = longest - len(words) if padding_side == "left" else 0
        ids = batch["input_ids"][window][batch["attention_mask"][window].bool()]
        assert tokenizer.convert_ids_to_tokens(ids.tolist()) == words
        assert [int(batch[name][window].argmax()) for name in ("start", "end")] == [start + shift, end + shift]
        assert int((batch["start"][window] >= 0).sum()) == len(words)
    assert 0.2 < sum(place != (0, 0) for _, _, place in wanted) / len(wanted) < 0.8


@pytest.mark.parametrize("length", range(1, 9))
def test_an_answer_of_one_token_more_than_is_shared_is_whole_in_a_window_wherever_it_lies(length: int) -> None:
    """Of more it may be in none; such a question is counted as cut, and learned as one without an answer."""
    words = [f"w{number}" for number in range(20, 60)]
    rows = []
    for at in range(len(words) - length):
        rows.append(asked(" ".join(words), "w5", (" ".join(words[at : at + length]), len(" ".join([*words[:at], ""])))))
    found = encoded(rows, max_length=14, stride=4)
    batch = found.batch(range(len(found)))
    held = {
        question for question, label in zip(found.together, batch["start"].argmax(-1).tolist(), strict=True) if label
    }
    assert found.cut == len(rows) - len(held)
    assert (len(held) == len(rows)) == (length <= 5)


def test_roberta_has_two_tokens_between_question_and_context() -> None:
    found = encoded([asked("w20 w21 w22", "w5", ("w21 w22", 4))], word_tokenizer(PAIRS["roberta"]))
    batch = found.batch([0])
    assert batch["input_ids"].tolist() == [[CLS, 5, SEP, SEP, 20, 21, 22, SEP]]
    assert (batch["start"].argmax().item(), batch["end"].argmax().item()) == (5, 6)


def test_a_tokenizer_without_a_classification_token_has_no_answer_at_its_first() -> None:
    tokenizer = word_tokenizer("$A $B")
    tokenizer.cls_token = None
    found = encoded([asked("w20 w21", "w5 w7"), asked("w20 w21", "w5 w7", ("w21", 4))], tokenizer)
    batch = found.batch([0, 1])
    assert batch["start"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_a_question_is_cut_where_it_leaves_the_context_less_than_twice_the_stride() -> None:
    """24 tokens less 3 special ones and 2 x 5 leave 11 words."""
    long, short = " ".join(f"w{number}" for number in range(20, 35)), " ".join(f"w{number}" for number in range(20, 31))
    found = encoded([asked("w50 w51", long, ("w51", 4)), asked("w50 w51", short)])
    assert found.cut == 1
    ids = found.batch([0, 1])["input_ids"].tolist()
    assert ids[0] == ids[1] == [CLS, *range(20, 31), SEP, 50, 51, SEP]


def test_an_answers_spaces_and_half_words_are_whole_tokens() -> None:
    """ " w21" begins at a space; "21 w2" is half of two words."""
    rows = [asked("w20 w21 w22", "w5", (" w21", 3)), asked("w20 w21 w22", "w5", ("21 w2", 5))]
    batch = encoded(rows).batch([0, 1])
    assert batch["start"].argmax(-1).tolist() == [4, 4] and batch["end"].argmax(-1).tolist() == [4, 5]


def test_no_rows_encode_to_nothing() -> None:
    config = DataConfig(task="question-answering", max_length=24, stride=5)
    columns = TASK.columns(Dataset.from_list(some_questions(3)).flatten(), config, (), "here")
    assert len(TASK.encode(Dataset.from_dict(dict(columns)).select([]), word_tokenizer(), config, True)) == 0


# Loss


def tiny_bert() -> BertForQuestionAnswering:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    return BertForQuestionAnswering(BertConfig(vocab_size=97, max_position_embeddings=32, **sizes)).eval()


def test_the_loss_of_rows_without_padding_is_that_of_transformers_head() -> None:
    rows = [row for row in some_questions(40) if len(row["context"].split()) > 19]
    found = encoded(rows)
    part = [row for row in range(len(found)) if found.length(row) == 24]
    model, batch = tiny_bert(), found.batch(part)
    start, end = (batch.pop(name).argmax(-1) for name in ("start", "end"))
    out = model(**batch, start_positions=start, end_positions=end)
    ours = loss(torch.stack([out.start_logits, out.end_logits], -1), found.aims(part))
    assert len(part) > 20 and bool((start > 0).any()) and bool((start == 0).any())
    torch.testing.assert_close(ours, out.loss)


def test_the_loss_is_the_mean_of_log_probabilities_of_start_and_end_without_padding() -> None:
    """Logits ln 1, ln 3 of a start (the second) and ln 1, ln 1 of an end (the first), beside a padding token with a
    thousand: probabilities 3/4 and 1/2.
    """
    logits = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [1e3, 1e3]]]).log()
    targets = {"start": torch.tensor([[0, 1, -100]]), "end": torch.tensor([[1, 0, -100]])}
    assert loss(logits, targets).item() == pytest.approx(-(torch.tensor([0.75, 0.5]).log().mean()).item())
    half = loss(logits.half(), targets)
    assert half.dtype == torch.float32 and half.shape == ()


# Answers


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_the_best_span_is_the_best_of_all(longest: int) -> None:
    generator, draw = torch.Generator().manual_seed(longest), random.Random(longest)
    scores = torch.randn(40, 17, 2, generator=generator)
    inside = torch.zeros(40, 17, dtype=torch.bool)
    for row in inside:
        first = draw.randrange(16)
        row[first : first + draw.randrange(1, 17)] = True
    found = zip(*(each.tolist() for each in best_spans(scores, inside, longest)), strict=True)
    for row, (start, end, score) in enumerate(found):
        places = [
            (start, end)
            for start, end in itertools.product(range(17), repeat=2)
            if start <= end < start + longest and inside[row, start] and inside[row, end]
        ]
        best = max(places, key=lambda place: scores[row, place[0], 0] + scores[row, place[1], 1])
        assert (start, end) == best
        assert score == pytest.approx(float(scores[row, start, 0] + scores[row, end, 1]))


def test_a_window_without_any_context_has_no_span() -> None:
    *_, score = best_spans(torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool), 3)
    assert score.tolist() == [float("-inf")]


class Fixed:
    """A model whose logits are these of each row of tokens: start and end by the token's number, 0 if not named."""

    def __init__(self, **by_word: tuple[float, float]) -> None:
        self.by_id = {CLS if word == "none" else int(word[1:]): value for word, value in by_word.items()}

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tensor(
            [[self.by_id.get(token, (0.0, 0.0)) for token in row] for row in inputs["input_ids"].tolist()]
        )


def answer_of(row: Row, model: Fixed, padding_side: str = "right", **keys: Any) -> str:
    found = encoded([row, asked("w90 w91", "w5")], word_tokenizer(padding_side=padding_side), **keys)
    part = range(len(found))
    return answers(found, part, model.logits(found.inputs(part)))[0]


LONG = " ".join(f"w{number}" for number in range(20, 60))


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    ("model", "answer"),
    [
        (Fixed(w30=(2, 0), w32=(0, 2)), "w30 w31 w32"),
        (Fixed(w32=(2, 0), w30=(0, 2)), "w20"),  # an end before its start is none; all others are equal
        (Fixed(w30=(2, 0), w32=(0, 2), none=(3, 0.5)), "w30 w31 w32"),  # 3.5 < 4
        (Fixed(w30=(2, 0), w32=(0, 2), none=(3, 1.5)), ""),  # 4.5 > 4, in every window
        (Fixed(w30=(2, 0), w32=(0, 2), w50=(5, 5)), "w50"),  # in another window
        (Fixed(w5=(9, 9), w30=(1, 1)), "w30"),  # not in the question
        (Fixed(w22=(2, 0), w24=(0, 2)), "w22 w23 w24"),
        (Fixed(w22=(3, 0), w25=(0, 3), w23=(0, 1)), "w22 w23"),  # four tokens are too many
    ],
)
def test_an_answer_is_the_best_span_of_all_windows_unless_none_is_better_in_each(
    model: Fixed, answer: str, padding_side: str
) -> None:
    if answer == "w20":
        model.by_id[20] = (0.0, 2.5)
    assert answer_of(asked(LONG, "w5"), model, padding_side, max_answer_length=3) == answer


def test_no_answer_must_score_higher_in_every_window() -> None:
    """Two windows, each with "no answer" at its first token: 5 and n, and the best span of both is a word with 4."""
    found = encoded([asked(" ".join(f"w{number}" for number in range(20, 45)), "w5")])
    assert len(found) == 2
    logits = torch.zeros(2, 24, 2)
    logits[0, 7], logits[0, 0] = 2.0, 2.5
    for none, answer in ((1.5, "w24"), (2.5, "")):
        logits[1, 0] = none
        assert answers(found, [0, 1], logits) == answers(found, [1, 0], logits.flip(0)) == {0: answer}


def test_scores_do_not_depend_on_how_many_windows_pass_at_once() -> None:
    """Windows of a question are judged together; and the sums are those of the official rules on whole rows."""
    rows = some_questions(30)
    model = Fixed(**{f"w{number}": ((number * 37) % 11, (number * 53) % 13) for number in range(17, 97)}, none=(9, 9))
    found = encoded(rows)
    totals = []
    for size in (1, 4, 1000):
        parts = list(found.parts(size))
        assert sorted(itertools.chain(*parts)) == list(range(len(found)))
        sums = [TASK.judge(model, found, part) for part in parts]
        totals.append({name: sum(each[name] for each in sums) for name in sums[0]})
    assert totals[1] == pytest.approx(totals[0]) and totals[2] == pytest.approx(totals[0])
    assert totals[0]["questions"] == 30 and totals[0]["answerable-questions"] == 20
    assert totals[0]["examples"] == len(found) > 30
    assert set(totals[0]) == {"loss", "examples", *TASK.sums}
    report = TASK.report(totals[0])
    assert report["exact"] == totals[0]["exact"] / 30 and report["f1"] == totals[0]["f1"] / 30


def test_an_answer_scores_against_all_that_people_gave() -> None:
    row = asked("w20 w21 w22", "w5", ("w20", 0), ("w21 w22", 4))
    sums = TASK.judge(Fixed(w21=(2, 0), w22=(0, 2)), encoded([row]), [0])
    assert (sums["exact"], sums["f1"], sums["answerable-exact"]) == (1, 1, 1)


def test_a_part_of_the_metrics_that_has_no_questions_is_left_out() -> None:
    sums = TASK.judge(Fixed(none=(1, 1)), encoded([asked("w20", "w5")]), [0])
    assert TASK.report(sums) == {"exact": 1, "f1": 1, "unanswerable-exact": 1}


def test_a_tokenizer_that_cannot_tell_where_its_tokens_lie_is_refused() -> None:
    slow = SimpleNamespace(is_fast=False, num_special_tokens_to_add=lambda pair: 3)
    with pytest.raises(SpryError, match=r"take a checkpoint that has a tokenizer\.json"):
        encoded(some_questions(2), slow)  # type: ignore[arg-type]


def test_a_context_without_words_has_no_answer() -> None:
    assert answer_of(asked("", "w5"), Fixed()) == ""


def test_a_text_is_shortened_to_so_many_tokens_of_its_words() -> None:
    """A tokenizer of parts of words: ab, cd, x."""
    pairs = Tokenizer(WordPiece({"[UNK]": 0, "ab": 1, "##cd": 2, "##x": 3}, unk_token="[UNK]"))
    pairs.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, unk_token="[UNK]")
    questions = ["abcd", "abcdx", "abcdxcd", "ab ab ab", ""]
    found = shortened(questions, tokenizer, 2)
    assert found == ["abcd", "abcd", "abcd", "ab ab ", ""]
    assert all(len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 2 for text in found)
