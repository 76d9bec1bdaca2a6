"""Train, and set up and check a training run."""
