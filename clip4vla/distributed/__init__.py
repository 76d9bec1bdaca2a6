"""Collectives of the ranks, and the watchdog that ends a run in which a rank hangs."""
