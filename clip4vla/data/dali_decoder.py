"""Decode the bytes of JPEG and PNG pictures to tensors, by DALI."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla.errors import UserError
from clip4vla.quick_imports import quick_imports


class Decoder:
    """Decodes JPEG and PNG bytes to uint8 pictures by a DALI graph; on a GPU decoding is `mixed`."""

    def __init__(self, most: int, channels: int, threads: int, device: torch.device):
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
            self.pipe.set_outputs(fn.decoders.image(source, device="mixed" if cuda else "cpu", output_type=kind))
        self.pipe.build()

    def run(self, pictures: list[bytes]) -> Any:
        """Decode to DALI's list of pictures (height, width, channels); on a GPU it is good until the next run."""
        self.pipe.feed_input("bytes", [np.frombuffer(picture, np.uint8) for picture in pictures])
        (out,) = self.pipe.run()
        return out

    def joined(self, pictures: Any) -> Tensor:
        """Concatenate the pictures' rows to (rows, width, channels), in memory of their own."""
        if self.stream:  # not the training's stream: the copy must be over before the next run, and training may lag
            with torch.cuda.stream(self.stream):
                rows = torch.cat([torch.from_dlpack(pictures[i]) for i in range(len(pictures))])
            self.stream.synchronize()
            rows.record_stream(torch.cuda.default_stream(rows.device))
            return rows
        shapes = pictures.shape()  # each run has memory of its own, where the pictures lie one after the other
        return torch.from_dlpack(pictures.as_reshaped_tensor([sum(shape[0] for shape in shapes), *shapes[0][1:]]))
