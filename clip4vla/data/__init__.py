"""Shards to a Batch: formats, the order of samples, decoding, packing."""
