"""The resident worker: one process a node that keeps the model warm, and the thin side that hands messages to it."""
