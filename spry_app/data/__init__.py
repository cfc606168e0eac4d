"""Rows to learn from: where they come from, what their columns mean, which node holds which. Never a token."""

from spry_app.data.batches import batches
from spry_app.data.corpus import Corpus, label_names, load_corpus
from spry_app.data.partition import Shard, label_counts, load_shard

__all__ = ["Corpus", "Shard", "batches", "label_counts", "label_names", "load_corpus", "load_shard"]
