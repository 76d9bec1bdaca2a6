"""clip4vla: give a CLIP model ears."""

from clip4vla.model import CLIP4VLA

__all__ = ["CLIP4VLA"]
__version__ = "0.1.0"
