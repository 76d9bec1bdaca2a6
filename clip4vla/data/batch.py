"""Pack the clips of one step on one rank for the model, so that no padding is encoded.

Sizes and indices that depend on what a batch holds are computed on the CPU, from the batch as the loader made it
(Batch.on_host): to ask the device for them would make the host wait until it has done all that was given to it. What the
device needs of them goes there through `upload`, which does not wait.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

SEGMENTS = ("segments", "segment_rows", "hidden_rows", "hidden_channels")


class Labels(NamedTuple):
    """Holds what the losses need to know of B clips; see Batch."""

    group: Tensor
    has_text: Tensor
    has_frames: Tensor
    has_audio: Tensor


@dataclass
class Batch:
    """Holds B clips; F frames and S segments of all of them, concatenated; L text tokens.

    With the frozen towers' vectors (D wide) there are no tokens and no frames: L = 0, and F counts frame_vectors alone.
    """

    ids: list[str]
    captions: list[str]
    tokens: Tensor  # B L int64
    frames: Tensor  # F 3 H W uint8, of the vision tower's size
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
    caption_vectors: Tensor | None = None  # C D float16: of every caption of every clip, in an evaluation
    others: list[dict] = field(default_factory=list)  # the json of the clip that each one's sound is mixed with, if any
    share: Tensor | None = None  # B float32: of the own sound in what was mixed
    host: "Batch | None" = None  # what this was copied from, if it was; see on_host

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def on_host(self) -> "Batch":
        """Return this batch as it is in the CPU's memory, all but frames and segments, which DALI decodes on the device."""
        return self.host or self

    @property
    def frame_counts(self) -> Tensor:
        """Count the frames of each clip, (B,) int64 on the CPU."""
        return self._counts(self.on_host.frame_clip)

    @property
    def segment_counts(self) -> Tensor:
        """Count the segments of each clip, (B,) int64 on the CPU."""
        return self._counts(self.on_host.segment_clip)

    def _counts(self, owner: Tensor) -> Tensor:
        return owner.bincount(minlength=len(self) + 1)[: len(self)]

    @property
    def segment_type(self) -> Tensor:
        """Return the audio type (S,) of each segment's clip; any type in the padding."""
        return self.audio_type[self.segment_clip.clamp(max=len(self) - 1)]

    def padded(self, tokens: int) -> "Batch":
        """Pad this batch: F and S rounded up, and L to `tokens`, so that compiled code meets few shapes.

        Tower inputs to one of eight sizes an octave, from 32 on; vectors, which cost nothing, to a power of two. What is
        added belongs to clip number B, which `model.pool` drops, and has no valid rows.
        """
        out: dict[str, Any] = self._grown("segment_clip", SEGMENTS, _round_up(len(self.segment_clip)))
        if self.frame_vectors is None:
            out |= self._grown("frame_clip", ("frames",), _round_up(len(self.frame_clip)))
            out["tokens"] = torch.nn.functional.pad(self.tokens, (0, max(0, tokens - self.tokens.shape[1])))
        else:
            out |= self._grown("frame_clip", ("frame_vectors",), 1 << len(self.frame_clip).bit_length())
        return dataclasses.replace(self, **out)

    def _grown(self, clip: str, names: tuple[str, ...], size: int) -> dict[str, Tensor]:
        """Pad packs (n, ...) of these names with zeros to (size, ...), owned by clip number B."""
        out = {}
        for name in (clip, *names):
            x = getattr(self, name)
            out[name] = torch.cat([x, x.new_full((size - len(x), *x.shape[1:]), len(self) if name == clip else 0)])
        return out

    def labels(self) -> Labels:
        """Collect what tells which pairs are positive, negative or missing."""
        return Labels(*(getattr(self, name) for name in Labels._fields))

    def to(self, device: torch.device) -> "Batch":
        """Copy this batch's tensors to the device, without waiting; the copy keeps this one as its `host`."""
        return dataclasses.replace(self._each(lambda tensor: upload(tensor, device)), host=self.on_host)

    def pin(self) -> "Batch":
        """Pin what lies in the CPU's memory, so that copies to a GPU do not wait."""
        return self._each(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if torch.is_tensor(v)}
        return dataclasses.replace(self, **tensors)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting: from memory that is pinned, which it is first."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def unpack(packed: Tensor, counts: Tensor, most: int) -> Tensor:
    """Unpack the rows (n, ...) of B clips to (B, most, ...), zero where a clip has fewer; what is after the clips' is dropped.

    counts (B,) int64, on the CPU: rows of each clip, at most `most`.
    """
    places = (torch.arange(most) < counts[:, None]).flatten().nonzero()[:, 0]
    rows = packed.new_zeros(len(counts) * most, *packed.shape[1:])
    rows = rows.index_copy(0, upload(places, packed.device), packed[: len(places)])
    return rows.view(len(counts), most, *packed.shape[1:])


def _round_up(n: int) -> int:
    """Round n up to a multiple of 32, or of an eighth of the power of two below n if that is larger."""
    step = max(32, 1 << max(0, n.bit_length() - 4))
    return -(-max(n, 1) // step) * step
