"""Benchmarks of models at work: captions, scores of pairs, search."""
