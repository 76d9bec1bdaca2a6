"""Compute the losses: InfoNCE over all ranks, and the objective of a run."""
