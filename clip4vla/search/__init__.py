"""Search over media: `python -m clip4vla.search`."""
