"""Decode the bytes of JPEG and PNG pictures to tensors, and resize frames, by DALI."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla.errors import UserError
from clip4vla.media.images import Fit
from clip4vla.quick_imports import quick_imports


class Decoder:
    """Decodes JPEG and PNG bytes to uint8 pictures by a DALI graph; on a GPU decoding is `mixed`.

    stored, fit: strips of square frames of `stored` pixels are cut into them, and each is resized as a tower wants it.
    """

    def __init__(
        self, most: int, channels: int, threads: int, device: torch.device, stored: int = 0, fit: Fit | None = None
    ):
        try:
            with quick_imports():
                from nvidia.dali import fn, types
                from nvidia.dali.pipeline import Pipeline
        except ImportError:
            raise UserError("reading shards needs NVIDIA DALI: pip install 'clip4vla[dali]'") from None
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None
        plain, fresh = {"exec_async": False, "exec_pipelined": False}, {"exec_dynamic": True, "prefetch_queue_depth": 1}
        self.pipe = Pipeline(most, threads, device.index if cuda else None, **(plain if cuda else fresh))
        with self.pipe:
            kind = types.RGB if channels == 3 else types.GRAY
            source = fn.external_source(name="bytes")
            strips = fn.decoders.image(source, device="mixed" if cuda else "cpu", output_type=kind)
            self.pipe.set_outputs(strips, *([_resized(fn, types, strips, stored, fit)] if fit else []))
        self.pipe.build()

    def run(self, pictures: list[bytes]) -> tuple[Any, Any]:
        """Decode to DALI's lists of pictures (height, width, channels) and, of these, of what is wanted.

        That is the same, or with a fit their frames (F, H, W, channels). On a GPU they are good until the next run.
        """
        self.pipe.feed_input("bytes", [np.frombuffer(picture, np.uint8) for picture in pictures])
        out = self.pipe.run()
        return out[0], out[-1]

    def joined(self, pictures: Any) -> Tensor:
        """Concatenate pictures, or frames, along their first axis, in memory of their own."""
        if self.stream:  # not the training's stream: the copy must be over before the next run, and training may lag
            with torch.cuda.stream(self.stream):
                rows = torch.cat([torch.from_dlpack(pictures[i]) for i in range(len(pictures))])
            self.stream.synchronize()
            rows.record_stream(torch.cuda.default_stream(rows.device))
            return rows
        shapes = pictures.shape()  # each run has memory of its own, where the pictures lie one after the other
        return torch.from_dlpack(pictures.as_reshaped_tensor([sum(shape[0] for shape in shapes), *shapes[0][1:]]))


def _resized(fn: Any, types: Any, strips: Any, stored: int, fit: Fit) -> Any:
    """Cut strips into square frames and resize each with antialiasing, so that no frame's edge mixes with the next frame's."""
    mode = {"shortest": "not_smaller", "longest": "not_larger", "squash": "stretch"}[fit.resize_mode]
    kernel = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
    frames = fn.reshape(strips, shape=[-1, stored, stored, 3], layout="FHWC")
    frames = fn.resize(frames, size=fit.size, mode=mode, interp_type=kernel[fit.interpolation], antialias=True)
    return frames if fit.size[0] == fit.size[1] else fn.crop(frames, crop=fit.size, out_of_bounds_policy="pad")
