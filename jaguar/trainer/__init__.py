"""transformers' Trainer with forward passes only: its arguments, checkpoints, micro-batches and scoring."""
