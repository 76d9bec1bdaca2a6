"""The search page: `python -m clip4vla.web`."""
