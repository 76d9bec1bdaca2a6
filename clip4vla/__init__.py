"""clip4vla: give a CLIP model an audio encoder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip4vla.api import CLIP4VLA

__all__ = ["CLIP4VLA"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """CLIP4VLA, imported at first use: the commands that need no model start seconds earlier."""
    if name != "CLIP4VLA":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clip4vla.api import CLIP4VLA

    return CLIP4VLA
