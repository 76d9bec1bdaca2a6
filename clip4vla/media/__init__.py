"""Files of sound and pictures to frames and log-mel spectrograms."""
