"""Fine-tuning on a task, scoring a model on it, and the metrics."""
