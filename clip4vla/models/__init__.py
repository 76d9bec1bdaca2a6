"""The networks: towers, audio encoder, fusion heads, captioner, classifier."""
