"""Benchmarks of training: the loss, a step, its start, checkpoints, many ranks."""
