"""Made-up questions in the form that SQuAD has on the Hub, and checkpoints whose tokenizers know pairs. Not a test
itself.
"""

import json
import random
from pathlib import Path
from typing import Any

from tiny_checkpoints import write_checkpoint
from tiny_models import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CLS, SEP = 3, 4
"""w3 and w4 of tiny_checkpoints' words."""

PAIRS = {"bert": "[CLS] $A [SEP] $B:1 [SEP]:1", "roberta": "[CLS] $A [SEP] [SEP] $B [SEP]"}
"""Family -> how its tokenizer puts two texts together."""


def word_tokenizer(pairs: str = PAIRS["bert"], padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A token a word, w5 to w96; and CLS and SEP."""
    vocabulary = {"<unk>": 0, "<pad>": 1, "</s>": 2, "[CLS]": CLS, "[SEP]": SEP}
    words = Tokenizer(WordLevel(vocabulary | {f"w{i}": i for i in range(5, WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = [("[CLS]", CLS), ("[SEP]", SEP)]
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", pair=pairs, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )


def pair_checkpoint(folder: Path, family: str) -> str:
    write_checkpoint(folder, family)
    word_tokenizer(PAIRS[family]).save_pretrained(folder)
    return str(folder)


def some_questions(count: int, seed: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    """ "w5 wK ?" asks for the words between wK and the next w6; every third has no answer, every fifth has two."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        key, length = draw.randrange(7, 17), draw.randrange(1, 4)
        words = [f"w{draw.randrange(17, WORDS)}" for _ in range(draw.randrange(8, longest))]
        at = draw.randrange(len(words) - length)
        words[at:at] = [f"w{key}"]
        words[at + 1 + length : at + 1 + length] = ["w6"]
        answer, start = " ".join(words[at + 1 : at + 1 + length]), len(" ".join([*words[: at + 1], ""]))
        answers = {"text": [answer], "answer_start": [start]}
        if number % 3 == 2:
            key, answers = key + 1 if key < 16 else 7, {"text": [], "answer_start": []}
        elif number % 5 == 4:
            answers = {"text": [answer, words[-1]], "answer_start": [start, len(" ".join(words)) - len(words[-1])]}
        rows.append(
            {
                "id": f"q{number}",
                "title": f"t{number % 7}",
                "context": " ".join(words),
                "question": f"w5 w{key}",
                "answers": answers,
            }
        )
    return rows


def write_questions(path: Path, count: int, seed: int = 0) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in some_questions(count, seed)))
    return str(path)


def answering_run(folder: Path, family: str = "bert") -> dict[str, Any]:
    """Run config of two short rounds; contexts take one window or two."""
    return {
        "method": "spry",
        "model.name": pair_checkpoint(folder / family, family),
        "data.task": "question-answering",
        "data.source": write_questions(folder / "questions.jsonl", 60),
        "data.partition": "iid",
        "data.max-length": 24,
        "data.stride": 5,
        "data.holdout": 0.25,
        "client.learning-rate": 0.05,
        "client.local-steps": 2,
        "client.directions": 2,
        "server.learning-rate": 0.05,
        "num-server-rounds": 2,
        "server.evaluate-every": 2,
    }
