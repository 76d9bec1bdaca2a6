"""Encode audio: the vision tower's structure and first weights, an audio type token at the end, one position more."""

import copy

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clip4vla.errors import UserError
from clip4vla.models.towers import pooled_places


def type_token_weights(audio_type: str, own: Tensor | None = None, key: str = "model.audio_type") -> Tensor:
    """Weigh the T type tokens to append, as shares of ([VB], [NB]): (1, T, 2), or (S, T, 2) by the clips' own types.

    vb, nb: one token. both: both tokens, T = 2 (the paper's fine-tuning). none: T = 0. A number r: the token
    (1 - r) VB + r NB. `data`: own (S,) decides, 0 VB, 1 NB, 2 the mean of both.
    """
    if audio_type == "data":
        assert own is not None
        return torch.tensor([[1, 0], [0, 1], [0.5, 0.5]], device=own.device)[own][:, None]
    named = {"vb": [[1.0, 0.0]], "nb": [[0.0, 1.0]], "both": [[1.0, 0.0], [0.0, 1.0]], "none": []}
    if audio_type in named:
        return torch.tensor(named[audio_type]).reshape(1, -1, 2)
    try:
        ratio = float(audio_type)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise UserError(f"{key} must be vb, nb, both, none or a number from 0 to 1, not {audio_type!r}")
    return torch.tensor([[[1 - ratio, ratio]]])


class AudioEncoder(nn.Module):
    """Encodes spectrogram segments by a vision transformer. P = 49 patches of 32x32 with ViT-B/32, W width, T type tokens."""

    def __init__(self, vision: VisionTransformer, position_init: str = "matched"):
        super().__init__()
        self.trunk = copy.deepcopy(vision)
        positions = vision.positional_embedding.detach()
        extra = torch.randn_like(positions[:1])
        if position_init == "matched":  # CLIP has no row for it: drawn as its other rows are distributed
            extra = positions.mean(0, keepdim=True) + extra * positions.std(0, keepdim=True)
        self.trunk.positional_embedding = nn.Parameter(torch.cat([positions, extra]))
        self.type_embedding = nn.Parameter(torch.randn(2, positions.shape[1]) * positions.shape[1] ** -0.5)

    def forward(self, segments: Tensor, mix: Tensor) -> Tensor:
        """Encode normalised segments (S, C, 224, 224), C = 1 or 3, to vectors z (S, D), not normalised.

        mix: what type_token_weights gives.
        """
        trunk, position = self.trunk, self.trunk.positional_embedding
        weight = trunk.conv1.weight  # of mono, repeated in three channels, only the sum matters: a third of the work
        weight = weight.sum(1, keepdim=True) if segments.shape[1] == 1 else weight
        x = F.conv2d(segments, weight, stride=trunk.conv1.stride).flatten(2).transpose(1, 2)  # S P W
        count = len(x)
        types = (mix.to(x.dtype) @ self.type_embedding).expand(count, -1, -1)  # S T W; both share the last position
        start = trunk.class_embedding.expand(count, 1, -1)
        x = torch.cat([torch.cat([start, x], 1) + position[:-1], types + position[-1]], 1)
        x = pooled_places(trunk, trunk.ln_pre(x))
        x = trunk._pool(x[:, : len(position) - 1])[0]
        return x @ trunk.proj if trunk.proj is not None else x
