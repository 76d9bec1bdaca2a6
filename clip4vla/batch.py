"""What the loader hands to the model: the clips of one step on one rank, packed so that no padding is encoded."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Labels(NamedTuple):
    """What the losses need to know of B clips; see Batch."""

    group: Tensor
    has_text: Tensor
    has_frames: Tensor
    has_audio: Tensor


@dataclass
class Batch:
    """B clips; F frames and S segments of all of them, one behind the other; L text tokens.

    With the frozen towers' vectors (D wide) there are no tokens and no frames: L = 0, and F counts frame_vectors alone.
    """

    ids: list[str]
    captions: list[str]
    tokens: Tensor  # B L int64
    frames: Tensor  # F 3 224 224 uint8
    frame_clip: Tensor  # F int64: the clip that each frame belongs to
    segments: Tensor  # S C 224 224 uint8 code of dB, rows = time
    segment_clip: Tensor  # S int64
    segment_rows: Tensor  # S int64: valid rows of each segment
    hidden_rows: Tensor  # S 224 bool: time steps hidden in the augmented view
    hidden_channels: Tensor  # S 224 bool
    audio_type: Tensor  # B int64: 0 verbal [VB], 1 nonverbal [NB], 2 both
    group: Tensor  # B int64: clips with equal numbers are no negatives of each other
    has_text: Tensor  # B bool
    has_frames: Tensor  # B bool
    has_audio: Tensor  # B bool
    meta: list[dict]  # the json of each clip
    text_vectors: Tensor | None = None  # B D float16: of the captions
    frame_vectors: Tensor | None = None  # F D float16

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self) -> Labels:
        """Which pairs are positive, negative or missing."""
        return Labels(*(getattr(self, name) for name in Labels._fields))

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on the device, copied without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The same batch with what lies in the CPU's memory pinned, so that copies to a GPU do not wait."""
        return self._each(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: change(v) if torch.is_tensor(v) else v for name, v in values.items()})
