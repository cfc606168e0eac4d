"""The data sets of the papers as they are on the Hub, as run-config keys. How a method treats them is in presets.py."""

DATA_SETS: dict[str, dict[str, int | str]] = {
    # SPRY, arXiv:2405.15551.
    "ag_news": {
        "data.source": "fancyzhx/ag_news",
        "data.test": "test",
        "data.label-names": "World,Sports,Business,Sci/Tech",
    },
    "sst2": {
        "data.source": "nyu-mll/glue",
        "data.config": "sst2",
        "data.test": "validation",
        "data.text-field": "sentence",
        "data.label-names": "negative,positive",
    },
    "snli": {
        "data.source": "stanfordnlp/snli",
        "data.test": "test",
        "data.text-field": "premise",
        "data.text-pair-field": "hypothesis",
        "data.label-names": "entailment,neutral,contradiction",
        "data.unlabelled": "drop",  # pairs on which the annotators did not agree
    },
    "mnli": {
        "data.source": "nyu-mll/glue",
        "data.config": "mnli",
        "data.test": "validation_matched",
        "data.text-field": "premise",
        "data.text-pair-field": "hypothesis",
        "data.label-names": "entailment,neutral,contradiction",
    },
    "yahoo": {
        "data.source": "community-datasets/yahoo_answers_topics",
        "data.test": "test",
        "data.text-field": "{question_title} {question_content} {best_answer}",
        "data.label-field": "topic",
        "data.num-labels": 10,
    },
    "yelp": {
        "data.source": "fancyzhx/yelp_polarity",
        "data.test": "test",
        "data.num-labels": 2,  # the Hub calls them 1 and 2
    },
    # A row is an answer; those to one question stay together wherever they are dealt.
    "multirc": {
        "data.task": "multiple-answers",
        "data.source": "aps/super_glue",
        "data.config": "multirc",
        "data.test": "validation",
        "data.text-field": "paragraph",
        "data.text-pair-field": "{question} {answer}",
        "data.question-field": "idx.question",
        "data.label-names": "False,True",
    },
    # What it is dealt out by, having no labels, is our reading: the article.
    "squad_v2": {
        "data.task": "question-answering",
        "data.source": "rajpurkar/squad_v2",
        "data.test": "validation",
        "data.max-length": 384,
        "data.stride": 128,
        "data.label-field": "title",
    },
    # FedSPZO, arXiv:2502.10239; which texts are put together how is our reading.
    "rte": {
        "data.source": "aps/super_glue",
        "data.config": "rte",
        "data.test": "validation",
        "data.text-field": "premise",
        "data.text-pair-field": "hypothesis",
        "data.label-names": "entailment,not_entailment",
    },
    "wic": {
        "data.source": "aps/super_glue",
        "data.config": "wic",
        "data.test": "validation",
        "data.text-field": "{word}: {sentence1}",
        "data.text-pair-field": "{sentence2}",
        "data.label-names": "False,True",
    },
    "boolq": {
        "data.source": "aps/super_glue",
        "data.config": "boolq",
        "data.test": "validation",
        "data.text-field": "question",
        "data.text-pair-field": "passage",
        "data.label-names": "False,True",
    },
}
"""Name -> run-config keys, with the Hub's names of fields and, in their order, of classes."""
