"""What is learned: how rows become tensors, and how a model's answers are judged. One file a task."""
