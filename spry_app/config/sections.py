"""What is trained, and on what: model, adapter and data, every key with meaning, unit, default and check."""

import re
from typing import Literal

from pydantic import Field, field_validator

from spry_app.config.section import Count, Section


class ModelConfig(Section):
    name: str = Field("minilm", min_length=1)
    """Checkpoint of a model for `data.task`: a Hub name, a local path, or "minilm" (extra `demo`)."""
    revision: str = ""
    """Branch, tag or commit of a Hub checkpoint."""
    pooling: Literal["auto", "first", "mean"] = "auto"
    """What of a text its classifier sees: "first", what the checkpoint's own does, which in BERT's family is the first
    token; "mean", the mean of all tokens, which one more block takes that nobody trains; "auto", the mean where the
    checkpoint says that it was trained for it (sentence encoders do, in 1_Pooling/config.json) and has the family for
    it: BERT, RoBERTa, XLM-RoBERTa."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How frozen linear weights are kept (bitsandbytes)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of everything that is neither quantised nor trained."""
    device: str = "auto"
    """Where a client computes: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1"."""


class AdapterConfig(Section):
    """What is trained beside the head. A key that its kind does not use must stay at its default (ADAPTER_KEYS)."""

    kind: Literal["lora", "vera", "ia3", "bitfit", "layernorm", "prompt", "p-tuning", "prefix", "none"] = "lora"
    """"lora"; "vera", two vectors of factors a matrix around random ones that all share; "ia3", factors on the
    activations of some matrices; "bitfit", all biases; "layernorm", all normalisations; "prompt", embeddings of virtual
    tokens before the text; "p-tuning", those from a small network; "prefix", keys and values of virtual tokens in every
    block; "none", the head alone."""
    rank: Count = 1
    """LoRA and VeRA (which wants a large one)."""
    rank_pattern: str = ""
    """LoRA only: ranks of matrices for which `rank` is not meant, as "query:4,value:2"."""
    alpha: float = Field(1.0, gt=0)
    """LoRA only: updates are multiplied by alpha / rank."""
    rslora: bool = False
    """LoRA only: by alpha / sqrt(rank) instead."""
    dora: bool = False
    """LoRA only: the length of each row of a matrix is trained apart from its direction."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """LoRA only."""
    targets: str = ""
    """LoRA, VeRA and IA3: names of the modules to adapt, separated by commas, or "all-linear", every linear layer
    of the transformer blocks. Empty for query and value, whatever the model calls them, or for PEFT's choice (IA3):
    mostly key, value and the last matrix of the feed-forward layer."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """LoRA only: which biases are trained beside it (PEFT's `bias`)."""
    subspace: Literal["none", "core", "combined", "shared", "random"] = "none"
    """LoRA only: what of it is trained. "none", all; "core", rank x rank numbers a matrix between two fixed factors;
    "combined", `coordinates` numbers a matrix, weights of fixed cores; "shared" and "random", `coordinates` numbers in
    all. What is saved is LoRA. The fewer numbers, the less noise in a gradient made of slopes."""
    coordinates: int = Field(0, ge=0, lt=2**31)
    """"combined": numbers trained a matrix, at most rank x rank; "shared", "random": numbers trained in all."""
    frame: Literal["random", "singular"] = "random"
    """"core", "combined": the fixed factors. "random", drawn from `seed` by every node; "singular", the first singular
    vectors of the weights, which the server computes and sends to each node once."""
    virtual_tokens: Count = 8
    """"prompt", "p-tuning", "prefix": how many."""
    path: str = ""
    """Folder, on the server's machine, of an adapter to start from: Spry's or PEFT's own. The other keys must make the
    same adapter; `spry run` sets them from it where they are left open."""

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_are_numbers(cls, pattern: str) -> str:
        if pattern and not re.fullmatch(r"\s*[^:,\s]+:[1-9]\d{0,4}\s*(,\s*[^:,\s]+:[1-9]\d{0,4}\s*)*", pattern):
            raise ValueError('it must be names of matrices with their ranks, as "query:4,value:2"')
        return pattern

    @property
    def ranks(self) -> dict[str, int]:
        """Name of a matrix -> its rank, of those in `rank_pattern`."""
        pairs = (part.strip().split(":") for part in self.rank_pattern.split(",") if part.strip())
        return {name: int(rank) for name, rank in pairs}


ADAPTER_KEYS: dict[str, frozenset[str]] = {
    "lora": frozenset({"rank", "rank_pattern", "alpha", "rslora", "dora", "dropout", "targets", "bias"})
    | {"subspace", "coordinates", "frame", "path"},
    "vera": frozenset({"rank", "targets", "path"}),
    "ia3": frozenset({"targets", "path"}),
    "bitfit": frozenset({"path"}),
    "layernorm": frozenset({"path"}),
    "prompt": frozenset({"virtual_tokens", "path"}),
    "p-tuning": frozenset({"virtual_tokens"}),
    "prefix": frozenset({"virtual_tokens", "path"}),
    "none": frozenset({"path"}),
}
"""adapter.kind -> the other keys of `adapter` that it uses."""
SUBSPACE_KEYS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "core": frozenset({"frame"}),
    "combined": frozenset({"coordinates", "frame"}),
    "shared": frozenset({"coordinates"}),
    "random": frozenset({"coordinates"}),
}
"""adapter.subspace -> the keys of `adapter` that it uses and others do not."""
WHOLE_ONLY = frozenset({"rank_pattern", "dora", "path"})
"""Keys of `adapter` that are for adapter.subspace "none" alone."""


class DataConfig(Section):
    task: str = Field("classification", min_length=1)
    """What is learned from the rows: "classification", of a text or a pair of texts; "multiple-answers", each right or
    wrong and scored by question, as in MultiRC; "question-answering", by a piece of a text or not at all, as in SQuAD
    v2; "causal-lm", to go on with a text or to answer (instruction tuning); or "package.module:object" for a
    LearningTask of your own (spry_app/tasks/task.py). Keys that a task does not use must stay at their defaults."""
    source: str = Field("household", min_length=1)
    """"household" (embedded), a local .jsonl/.csv/.parquet file, or a Hub name."""
    config: str = ""
    """Configuration of a Hub data set, e.g. "sst2" of "glue"."""
    train_split: str = "train"
    """Split of a Hub data set that clients train on."""
    test: str = ""
    """Central test set: a local file, or a split of the source; empty for the embedded set's own, else "test"."""
    text_field: str = Field("text", min_length=1)
    """Column of the text; of its first sentence, for pairs; plain text of "causal-lm". To classify, also a template
    with columns in braces, "{word}: {sentence1}". A column within another is named by its path: "idx.question"."""
    text_pair_field: str = ""
    """The same of the second text, for pairs."""
    label_field: str = Field("label", min_length=1)
    """Column of the label: a whole number from 0 on, or a name. Where the task has none, what a Dirichlet partition
    deals rows out by."""
    num_labels: int = Field(0, ge=0)
    """Number of classes; 0 takes it from the data, which every node must then see alike."""
    label_names: str = ""
    """Names of the classes in order, separated by commas; needed where each node has its own file with named labels."""
    unlabelled: Literal["refuse", "drop"] = "refuse"
    """Rows whose label is -1 or missing: an error, or left out; how many is logged."""
    question_field: str = Field("question", min_length=1)
    """"question-answering": the question. "multiple-answers": what only the answers to one question share, such as its
    number."""
    context_field: str = Field("context", min_length=1)
    """"question-answering": the text that holds the answers."""
    max_answer_length: int = Field(30, ge=1)
    """"question-answering": tokens that an answer may have."""
    stride: int = Field(16, ge=0)
    """"question-answering": a long context is split into windows of `max-length` tokens, question included, of which
    two share so many of the context: an answer of one more is whole in one of them. A question is cut where it would
    leave the context less than twice as many."""
    prompt_field: str = ""
    """"causal-lm": what is said to the model. With `answer-field`, which it is to say; or empty, and the columns are
    called prompt and completion, or messages, or else `text-field` is plain text."""
    answer_field: str = ""
    """"causal-lm": what the model is to answer to `prompt-field`. Only this counts in the loss. "question-answering":
    column with the lists `text` and `answer_start` (first characters in the context), both empty where a question has
    no answer; models learn the first, and are scored by the one that fits best. Empty for "answers"."""
    messages_field: str = ""
    """"causal-lm": a list of {"role", "content"}, written by the tokenizer's chat template. Only what the role
    "assistant" says counts in the loss."""
    packing: bool = False
    """"causal-lm": rows to train on that are shorter than `max-length` share it, none of them seeing another."""
    max_length: int = Field(64, ge=4)
    """Tokens kept of a text. What becomes of longer ones, the task says: they are cut, or (plain text of "causal-lm")
    split, and how many is logged."""
    partition: Literal["iid", "dirichlet", "natural"] = "natural"
    """How a simulation deals the rows to its nodes: as they come, each with labels of its own (`alpha`), or by what a
    field says (`natural-field`)."""
    alpha: float = Field(1.0, gt=0)
    """Concentration of the Dirichlet partition over labels; smaller is less alike."""
    equal_sizes: bool = False
    """Dirichlet: draw what each shard is made of, so that all have as many rows, and not how each label is spread over
    them, which for a small alpha and few labels leaves some of many shards without any."""
    natural_field: str = "household"
    """Field whose values (a user id, a household) are never split between two shards."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Part of every shard kept back to measure personalised accuracy."""
    cache_mib: int = Field(8192, ge=0)
    """MiB that a machine may keep on its disk of rows and tokens, in $SPRY_CACHE or ~/.cache/spry: more than a MiB of
    rows is trained on from there, not from memory, and is tokenised once, not at every start. Past it, what was used
    longest ago goes; 0 keeps nothing beyond the process."""
