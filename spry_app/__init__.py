"""Spry: federated fine-tuning of language models by forward gradients, as a Flower app."""
