"""CLIP4VLA as others use it: files, waveforms, pictures and texts in; vectors, captions and labels out.

Needs neither DeepSpeed nor DALI, wandb or webdataset. Notation: N files, waves or texts, D width of the common space.
"""

from huggingface_hub import ModelHubMixin

from clip4vla.model import Model


class CLIP4VLA(Model, ModelHubMixin):
    """A trained model."""
