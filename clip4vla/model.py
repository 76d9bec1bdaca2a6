"""CLIP4VLA: text, vision and audio towers into one space, and the pooling of frames and segments into clips."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clip4vla import towers
from clip4vla.audio_encoder import AudioEncoder, type_mix
from clip4vla.batch import Batch
from clip4vla.config import DataConfig, LossConfig, MaskConfig, ModelConfig, SpectrogramConfig, UserError, load, to_dict
from clip4vla.masking import masked_view
from clip4vla.spectrogram import decode, normalise


class CLIP4VLA(nn.Module):
    """The model. clip: open_clip configuration of the towers; spectrogram: as the shards that it is trained on were made."""

    def __init__(self, clip: dict[str, Any], cfg: ModelConfig, spectrogram: SpectrogramConfig):
        super().__init__()
        self.clip_config, self.cfg, self.spectrogram = clip, cfg, spectrogram
        built = towers.build_clip(clip)
        self.text, self.vision = built.text, built.visual
        self.audio = AudioEncoder(built.visual, cfg.position_init)
        self.log_scale = nn.Parameter(
            torch.tensor([math.log(1 / cfg.temperature)])
        )  # 1-d: DeepSpeed broadcasts no scalars
        self.image_statistics = towers.image_statistics(cfg.clip)

    def load_clip(self) -> bool:
        """Fill text and vision from the weights that cfg.clip names; False if it names none."""
        built = towers.build_clip(self.clip_config)
        found = towers.load_clip_weights(built, self.cfg.clip)
        if found:
            self.text.load_state_dict(built.text.state_dict())
            self.vision.load_state_dict(built.visual.state_dict())
        return found

    def start_audio(self) -> None:
        """Initialise the audio tower from the vision tower (or leave it fresh), as cfg.audio_init says."""
        if self.cfg.audio_init == "vision":
            self.audio = AudioEncoder(self.vision, self.cfg.position_init)

    def freeze(self) -> None:
        """Leave only the towers of cfg.train_towers, and the temperature if it is learned, trainable."""
        wanted = self.cfg.train_towers.split("+")
        for name in wanted:
            if name not in ("text", "vision", "audio"):
                raise UserError(f"model.train_towers: {name!r} is none of text, vision, audio (joined by +)")
        for name in ("text", "vision", "audio"):
            getattr(self, name).requires_grad_(name in wanted)
        self.log_scale.requires_grad_(self.cfg.learn_temperature)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(x^g (B, D) at [EOS], all token outputs (B, L, D)), not normalised."""
        return towers.encode_text(self.text, tokens)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Vectors (F, D), not normalised, of RGB frames (F, 3, 224, 224) in 0..255."""
        if not len(frames):  # open_clip's tower fails on none, and under ZeRO-3 all ranks must run it
            return self.encode_frames(frames.new_zeros(1, *frames.shape[1:]))[:0]
        mean, std = (255 * torch.tensor(x, device=frames.device).view(3, 1, 1) for x in self.image_statistics)
        return self.vision(((frames.float() - mean) / std).to(self.vision.conv1.weight.dtype))

    def encode_segments(self, segments: Tensor, mix: Tensor) -> Tensor:
        """Vectors (S, D), not normalised, of normalised segments; mix: see audio_encoder.type_mix."""
        return self.audio(segments.to(self.audio.type_embedding.dtype), mix.to(segments.device))

    def encode_audio(self, batch: Batch, audio_type: str) -> Tensor:
        """z^g (B, D), unit length, of a batch's segments under a type token; zero where a clip has no audio."""
        segments = normalise(decode(batch.segments, self.spectrogram), batch.segment_rows, self.cfg.normalise)
        mix = type_mix(audio_type, batch.segment_type)
        return pool(self.encode_segments(segments, mix), batch.segment_clip, len(batch))

    def encode_captions(self, batch: Batch) -> Tensor:
        """x^g (B, D), unit length, of a batch's captions, from their vectors if it has them."""
        given = batch.text_vectors is not None
        return F.normalize((batch.text_vectors if given else self.encode_text(batch.tokens)[0]).float(), dim=-1)

    def encode_vision(self, batch: Batch) -> Tensor:
        """y^g (B, D), unit length, from the frames' vectors if it has them; zero where a clip has no frames."""
        given = batch.frame_vectors is not None
        return pool(batch.frame_vectors if given else self.encode_frames(batch.frames), batch.frame_clip, len(batch))

    def forward(self, batch: Batch, loss: LossConfig, mask: MaskConfig) -> dict[str, Tensor]:
        """Unit vectors (B, D) that the losses with a weight need: text, vision, audio, masked; and `scale` = 1 / temperature."""
        fixed = torch.full_like(self.log_scale, 1 / self.cfg.temperature, dtype=torch.float32)  # log_scale may be bf16
        features = {"scale": self.log_scale.float().exp() if self.cfg.learn_temperature else fixed}
        if loss.at or loss.tv:
            with torch.set_grad_enabled(self._trains(self.text)):
                features["text"] = self.encode_captions(batch)
        if loss.av or loss.tv:
            with torch.set_grad_enabled(self._trains(self.vision)):
                features["vision"] = self.encode_vision(batch)
        if loss.at or loss.av or loss.aa:
            features |= self._audio_views(batch, loss, mask)
        return features

    def _audio_views(self, batch: Batch, loss: LossConfig, mask: MaskConfig) -> dict[str, Tensor]:
        """z^g and, for NCE_aa, that of the masked view, in one pass through the tower."""
        decibels = decode(batch.segments, self.spectrogram)
        views = [normalise(decibels, batch.segment_rows, self.cfg.normalise)]
        if loss.aa:
            hidden = batch.hidden_rows[:, :, None] | batch.hidden_channels[:, None, :]
            views.append(masked_view(decibels, batch.segment_rows, hidden, mask, self.cfg.normalise))
        mix = type_mix(self.cfg.pretrain_type, batch.segment_type)
        mix = mix.expand(len(decibels), -1, -1).repeat(len(views), 1, 1)
        vectors = self.encode_segments(torch.cat(views), mix).chunk(len(views))
        pooled = [pool(v, batch.segment_clip, len(batch)) for v in vectors]
        return dict(zip(("audio", "masked"), pooled, strict=False))

    def _trains(self, tower: nn.Module) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())

    def config(self) -> dict[str, Any]:
        """Everything that from_checkpoint needs beside the weights."""
        return {"clip": self.clip_config, "model": to_dict(self.cfg), "spectrogram": to_dict(self.spectrogram)}

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> "CLIP4VLA":
        """The model of a checkpoint folder (model.safetensors and config.json), in fp32, in evaluation mode."""
        try:
            tree = json.loads((Path(folder) / "config.json").read_text())
            model = cls(tree["clip"], ModelConfig(**tree["model"]), SpectrogramConfig(**tree["spectrogram"]))
            model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: not a readable checkpoint ({' '.join(str(error).split())[:200]})") from None
        return model.eval()


def pool(vectors: Tensor, clip: Tensor, clips: int) -> Tensor:
    """Unit vectors (clips, D), fp32: each vector (n, D) to unit length, mean by clip number (n,), to unit length again.

    Vectors of clip number `clips` are padding (Batch.padded).
    """
    unit = F.normalize(vectors.float(), dim=-1)
    total = unit.new_zeros(clips + 1, unit.shape[1]).index_add(0, clip, unit)[:clips]
    return F.normalize(total, dim=-1)


def from_official(state: dict[str, Tensor], cfg: ModelConfig) -> CLIP4VLA:
    """CLIP4VLA from the authors' flat state dict: clip.* (OpenAI's names), audio.visual.*; the task heads are left."""
    clip = {key[5:]: value.float() for key, value in state.items() if key.startswith("clip.")}
    config = towers.infer_config(clip, "official checkpoint") | {"quick_gelu": True}
    model = CLIP4VLA(config, cfg, load(DataConfig, None, ["preset=official"]).spectrogram)
    vision = {key[7:]: value for key, value in clip.items() if key.startswith("visual.")}
    text = {key: value for key, value in clip.items() if not key.startswith("visual.") and key != "logit_scale"}
    audio = {key[13:]: value.float() for key, value in state.items() if key.startswith("audio.visual.")}
    model.audio.type_embedding.data.copy_(audio.pop("control_embedding"))  # row 0 VB, row 1 NB
    model.vision.load_state_dict(vision)
    model.text.load_state_dict(text)
    model.audio.trunk.load_state_dict(audio)
    return model
