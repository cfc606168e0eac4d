"""Causal language modelling, of plain text or of answers alone (instruction tuning): tokens, loss, score.

The loss is the mean over all tokens that count, whichever row they are in. Greedy decoding would say an answer, word
for word, just where each of its tokens is the likeliest after those before it: so an exact match needs no decoding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from spry_app.config import DataConfig
from spry_app.errors import SpryError
from spry_app.tasks import dialogue
from spry_app.tasks.columns import dealt_by
from spry_app.tasks.conversation import examples, give_template
from spry_app.tasks.encoded import IGNORED, Encoded
from spry_app.tasks.packing import packed, refuse_what_cannot_be_packed
from spry_app.tasks.task import LearningTask, Model, Names, ratio

_MOST_TOKENS = 2.0**31
Example = tuple[list[int], list[bool]]
"""Tokens, and which of them count."""


def _columns(raw: Dataset, config: DataConfig, _names: Names, where: str) -> dict[str, Any]:
    """text or turns; label where rows are to be dealt out by it."""
    return dialogue.columns(raw, config, where) | dealt_by(raw, config)


def _encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, training: bool) -> Encoded:
    """Texts over max_length are split: pieces overlap by one token, so that each but the first is predicted once.

    Conversations are cut at their end; without an answer that is left they are dropped. Raises SpryError where nothing
    is left to train on.
    """
    size, found, cut, dropped = config.max_length, list[Example](), 0, 0
    for tokens, counts in _examples(dataset, tokenizer):
        cut += len(tokens) > size
        pieces = _windows(tokens, size) if "text" in dataset.column_names else [tokens[:size]]
        pairs = [(piece, [False, *counts[1 : len(piece)]]) for piece in pieces]
        kept = [(piece, learned) for piece, learned in pairs if any(learned)]
        dropped += not kept
        found += kept
    if training and len(dataset) and not found:
        raise SpryError(
            f"None of {len(dataset)} rows has a token to learn within the first {size}: raise data.max-length (now "
            f"{size}), or look at data.text-field or data.answer-field."
        )
    rows = Encoded(
        {"input_ids": [tokens for tokens, _ in found], "attention_mask": [[1] * len(tokens) for tokens, _ in found]},
        {"labels": [[t if c else IGNORED for t, c in zip(*pair, strict=True)] for pair in found]},
        cut,
        tokenizer,
        CAUSAL_LM,
        dropped,
        [sum(counts) for _, counts in found],
        "right",  # the first tokens stand where they would alone, whatever side the tokenizer generates from
    )
    return packed(rows, size) if training and config.packing else rows


def _examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    if "turns" in dataset.column_names:
        give_template(tokenizer)
        for turns in dataset["turns"]:
            yield from examples(turns, tokenizer)
        return
    if not len(dataset):
        return
    mark = tokenizer.eos_token_id
    for tokens in tokenizer(dataset["text"][:], verbose=False)["input_ids"]:
        end = [] if mark is None or tokens[-1:] == [mark] else [mark]
        yield [*tokens, *end], [True] * (len(tokens) + len(end))


def _windows(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[start : start + size] for start in range(0, len(tokens) - 1, size - 1)]


def _loss(model: Model, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    return model.next_token_loss(inputs, targets["labels"])


@torch.no_grad()
def _judge(model: Model, rows: Encoded, part: Sequence[int]) -> dict[str, float]:
    labels = rows.aims(part)["labels"]
    losses, hits = (scores.cpu() for scores in model.next_token_scores(rows.inputs(part), labels))
    count, right = (labels[:, 1:] != IGNORED).sum(-1), hits.sum(-1)
    return {
        "loss": losses.double().sum().item(),
        "tokens": int(count.sum()),
        "tokens-right": int(right.sum()),
        "rows-right": int((right == count).sum()),
        "examples": len(part),
    }


@torch.no_grad()
def _prepare(adapted: Any, config: DataConfig) -> None:
    """Raises SpryError for a model that sees ahead, or has a way to its loss that is not known, or cannot keep packed
    rows apart.
    """
    if config.prompt_field or config.messages_field:
        give_template(adapted.tokenizer)
    name = adapted.model.config.model_type
    words = torch.arange(1, 9) % adapted.model.config.vocab_size
    other = words.clone()
    other[-1] = 0
    one, two = (adapted.features({}, {"input_ids": ids[None]})[0, :-1] for ids in (words, other))
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        raise SpryError(
            f"A {name} model sees the tokens that it is to predict, so it is no causal language model: set model.name "
            "to one (GPT-2, OPT, Llama, ...), or data.task to classification."
        )
    inputs = {"input_ids": words[None]}
    whole = cross_entropy(adapted.logits({}, inputs)[0, :-1], words[1:].to(adapted.device))
    if not torch.isclose(whole, adapted.next_token_loss({}, inputs, words[None]), rtol=1e-2):
        raise SpryError(
            f"A {name} model does something of its own between its output layer and its logits, so its loss cannot be "
            "computed a few tokens at a time: set another model.name."
        )
    if config.packing:
        refuse_what_cannot_be_packed(adapted, config.max_length)


CAUSAL_LM = LearningTask(
    noun="causal language",
    auto_model=AutoModelForCausalLM,
    peft_type="CAUSAL_LM",
    hub_task="text-generation",
    keys=frozenset({"text-field", "label-field", "prompt-field", "answer-field", "messages-field", "packing"}),
    columns=_columns,
    encode=_encode,
    loss=_loss,
    judge=_judge,
    sums={"tokens": (1, _MOST_TOKENS), "tokens-right": (0, _MOST_TOKENS), "rows-right": (0, 1)},
    metrics={
        "perplexity": lambda sums: math.exp(min(sums["loss"] / sums["tokens"], 700.0)),  # the largest that is a number
        "token-accuracy": ratio("tokens-right", "tokens"),
        "exact-match": ratio("rows-right", "examples"),
    },
    main_metric="token-accuracy",
    loss_over="tokens",
    head=False,
    prepare=_prepare,
)
