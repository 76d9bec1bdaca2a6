"""A batch of random content."""

import torch

from clip4vla.data.batch import Batch


def batch(clips=4, segments=7, frames=9, length=12, silent=0):
    """Clips with random content, the last `silent` of them without sound."""
    tokens = torch.randint(1, 400, (clips, length))
    tokens[:, -1] = 49407
    with_sound = clips - silent
    return Batch(
        ids=[str(i) for i in range(clips)], captions=[""] * clips, tokens=tokens,
        frames=torch.randint(0, 256, (frames, 3, 224, 224), dtype=torch.uint8),
        frame_clip=(torch.arange(frames) % clips).sort().values,
        segments=torch.randint(0, 256, (segments, 1, 224, 224), dtype=torch.uint8),
        segment_clip=(torch.arange(segments) % with_sound).sort().values, segment_rows=torch.full((segments,), 200),
        hidden_rows=torch.arange(224).expand(segments, 224) < 50, hidden_channels=torch.zeros(segments, 224, dtype=torch.bool),
        audio_type=torch.zeros(clips, dtype=torch.int64), group=torch.arange(clips), has_text=torch.ones(clips, dtype=torch.bool),
        has_frames=torch.ones(clips, dtype=torch.bool), has_audio=torch.arange(clips) < with_sound, meta=[{}] * clips,
    )  # fmt: skip
