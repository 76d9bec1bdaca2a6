"""Benchmarks of shards: making them, reading them, and how long a set takes."""
