"""Read the config.json of a model folder in the formats there have been."""

from pathlib import Path
from typing import Any

from clip4vla.errors import UserError

FORMAT = 2  # of config.json
FORMAT_1 = {  # its settings, by today's names
    "fusion": "head",
    "fusion_layers": "head_layers",
    "fusion_dropout": "head_dropout",
    "words": "text_tokens",
    "mean": "media_mean",
    "normalise": "spectrogram_norm",
    "pretrain_type": "pretrain_audio_type",
    "train_towers": "trainable_towers",
}


def upgraded(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """Upgrade a config.json of format 1 to the names of FORMAT; UserError for a later format."""
    number = tree.pop("format", 1)
    if number not in (1, FORMAT):
        raise UserError(f"{file}: format={number}: this version reads {FORMAT} at most; install a newer clip4vla")
    if number == 1:
        tree["model"] = {FORMAT_1.get(name, name): value for name, value in tree["model"].items()}
        if tree["model"].get("media_mean") == "unit":
            tree["model"]["media_mean"] = "normalized"
    return tree
