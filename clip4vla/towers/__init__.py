"""Text and vision towers of CLIPs: which there are, their weights, their inputs, and how they are run."""
