"""Text, vision and audio towers into one space, and the pooling of frames and segments into clips."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from clip4vla import distributed, fusion, towers
from clip4vla.audio_encoder import AudioEncoder, type_mix
from clip4vla.batch import Batch
from clip4vla.captioner import Captioner, Growing
from clip4vla.classifier import Classifier, label_of
from clip4vla.config import FramesConfig, LossConfig, MaskConfig, ModelConfig, SpectrogramConfig, UserError
from clip4vla.masking import masked_view
from clip4vla.settings import from_tree, parse_json, to_dict
from clip4vla.spectrogram import decode, normalise

TEXTS = 256  # of a pass through the text tower


class Model(nn.Module):
    """The model. clip: open_clip configuration of the towers; spectrogram, frames: as the shards it is trained on were made."""

    head: Any  # as cfg.fusion names it: a Classifier, a Captioner, or one of fusion.py's

    def __init__(
        self,
        clip: dict[str, Any],
        cfg: ModelConfig,
        spectrogram: SpectrogramConfig,
        frames: FramesConfig | None = None,
    ):
        super().__init__()
        self.clip_config, self.cfg, self.spectrogram = clip, cfg, spectrogram
        self.frames = frames or FramesConfig()
        built = towers.build_clip(clip)
        self.text, self.vision = built.text, built.visual
        self.audio = AudioEncoder(built.visual, cfg.position_init)
        self.start_head()
        self.log_scale = nn.Parameter(
            torch.tensor([math.log(1 / cfg.temperature)])
        )  # 1-d: DeepSpeed broadcasts no scalars
        self.image_statistics = towers.image_statistics(cfg.clip)

    def load_clip(self) -> bool:
        """Fill text and vision from the weights that cfg.clip names; False if it names none."""
        with torch.device("meta"):  # shapes alone: random weights would take a second, and the file's take their place
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

    def start_head(self) -> None:
        """A head as cfg.fusion names it; all but the classifier start from the text tower as it is now."""
        dim = self.clip_config["embed_dim"]
        if self.cfg.fusion == "classifier":
            self.head = Classifier(self.cfg, dim)
            return
        start = Captioner if self.cfg.fusion == "captioner" else fusion.build
        self.head = start(self.text, self.cfg, dim, self.spectrogram.max_segments)

    def must_have_positions(self) -> None:
        """UserError if captions may be longer than the text tower can read."""
        room = self.text.context_length
        if self.cfg.max_tokens > room:
            raise UserError(
                f"model.max_tokens={self.cfg.max_tokens}: the text tower of model.clip reads {room} at most"
            )

    def freeze(self) -> None:
        """Leave trainable: the towers of cfg.train_towers less cfg.freeze_layers, the head, a temperature that is learned."""
        wanted = self.cfg.train_towers.split("+")
        for name in wanted:
            if name not in ("text", "vision", "audio"):
                raise UserError(f"model.train_towers: {name!r} is none of text, vision, audio (joined by +)")
        for name in ("text", "vision", "audio"):
            getattr(self, name).requires_grad_(name in wanted)
        for name, blocks in self.cfg.freeze_layers.items():
            if name not in wanted:
                raise UserError(f"model.freeze_layers: {name!r} is none of the towers of model.train_towers")
            towers.freeze_first(self.audio.trunk if name == "audio" else getattr(self, name), blocks, name)
        self.log_scale.requires_grad_(self.cfg.learn_temperature)

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(x^g (B, D) at [EOS], all token outputs (B, L, D)), not normalised."""
        return towers.encode_text(self.text, tokens)

    def read_texts(
        self, texts: list[str], tokenize: Callable[[list[str]], Tensor], together: bool = False
    ) -> Iterator[tuple[Tensor, fusion.Sequence]]:
        """(x^g (n, D), not normalised, word outputs (n, L, D)) of n <= TEXTS texts at a time, so that memory is bounded.

        tokenize: see towers.tokenizer. together: all ranks call this, each with its own texts, and run as many passes (ZeRO-3).
        """
        passes = -(-len(texts) // TEXTS)
        for k in range(max(distributed.gather_objects(passes)) if together else passes):
            some = texts[k * TEXTS : (k + 1) * TEXTS]
            tokens = tokenize(some or [""]).to(self.log_scale.device)
            sentence, words = self.encode_tokens(tokens)
            if some:
                yield sentence, fusion.Sequence(fusion.TEXT, words, towers.words_there(self.text, tokens))

    def sentence_vectors(
        self, texts: list[str], tokenize: Callable[[list[str]], Tensor], together: bool = False
    ) -> Tensor:
        """x^g (N, D), unit length, fp32, of any number of texts; tokenize, together: see read_texts."""
        none = self.log_scale.new_zeros(0, self.clip_config["embed_dim"])
        found = [sentence for sentence, _ in self.read_texts(texts, tokenize, together)]
        return F.normalize(torch.cat([none, *found]).float(), dim=-1)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Vectors (F, D), not normalised, of RGB frames (F, 3, 224, 224) in 0..255."""
        if not len(frames):  # open_clip's tower fails on none, and under ZeRO-3 all ranks must run it
            return self.encode_frames(frames.new_zeros(1, *frames.shape[1:]))[:0]
        mean, std = (255 * torch.tensor(x, device=frames.device).view(3, 1, 1) for x in self.image_statistics)
        return towers.encode_images(self.vision, ((frames.float() - mean) / std).to(self.vision.conv1.weight.dtype))

    def encode_segments(self, segments: Tensor, mix: Tensor) -> Tensor:
        """Vectors (S, D), not normalised, of normalised segments; mix: see audio_encoder.type_mix."""
        return self.audio(segments.to(self.audio.type_embedding.dtype), mix.to(segments.device))

    def segment_vectors(self, batch: Batch, audio_type: str) -> Tensor:
        """Vectors (S, D), not normalised, of a batch's segments under a type token."""
        segments = normalise(decode(batch.segments, self.spectrogram), batch.segment_rows, self.cfg.normalise)
        return self.encode_segments(segments, type_mix(audio_type, batch.segment_type))

    def frame_vectors(self, batch: Batch) -> Tensor:
        """Vectors (F, D) of a batch's frames, from embed.py if it has them."""
        return self.encode_frames(batch.frames) if batch.frame_vectors is None else batch.frame_vectors

    def caption_vectors(self, batch: Batch, tokens: Tensor) -> tuple[Tensor, fusion.Sequence | None]:
        """x^g (B, D), not normalised, and all word outputs of tokens (B, L); from embed.py x^g alone, if the batch has them."""
        if batch.text_vectors is not None:
            return batch.text_vectors, None
        sentence, words = self.encode_tokens(tokens)
        return sentence, fusion.Sequence(fusion.TEXT, words, towers.words_there(self.text, tokens))

    def pooled_segments(self, batch: Batch, audio_type: str) -> Tensor:
        """z^g (B, D), unit length, of a batch's segments under a type token; zero where a clip has no audio."""
        return pool(self.segment_vectors(batch, audio_type), batch.segment_clip, len(batch))

    def pooled_frames(self, batch: Batch) -> Tensor:
        """y^g (B, D), unit length, from the frames' vectors if it has them; zero where a clip has no frames."""
        return pool(self.frame_vectors(batch), batch.frame_clip, len(batch))

    def forward(self, batch: Batch, loss: LossConfig, mask: MaskConfig) -> dict[str, Tensor]:
        """What the losses with a weight need, and `scale` = 1 / temperature: unit vectors (B, D) text, vision, audio, masked;
        media (B, D) as the head gives them, or its scores (B, N) of own captions and the clips of all ranks; or, of each
        clip (B,), the negative log-likelihood `nll` of its caption's words or of its label."""
        fixed = torch.full_like(self.log_scale, 1 / self.cfg.temperature, dtype=torch.float32)  # log_scale may be bf16
        features = {"scale": self.log_scale.float().exp() if self.cfg.learn_temperature else fixed}
        if loss.at or loss.tv or loss.tm or loss.caption:
            tokens, chosen = self.learnt_words(batch, loss) if loss.caption else (batch.tokens, None)
            with torch.set_grad_enabled(self._trains(self.text)):
                sentence, words = self.caption_vectors(batch, tokens)
            features["text"] = F.normalize(sentence.float(), dim=-1)
        frames = None
        if "vision" in needed_towers(loss, self.cfg.modalities):
            with torch.set_grad_enabled(self._trains(self.vision)):
                frames = self.frame_vectors(batch)
                if loss.av or loss.tv:
                    features["vision"] = pool(frames, batch.frame_clip, len(batch))
        if loss.at or loss.av or loss.aa:
            features |= self._audio_views(batch, loss, mask)
        if loss.tm:
            parts = self.media(
                batch,
                frames,
                fixed=isinstance(self.head, fusion.LocalToLocal) and distributed.world() > 1,
            )
            features |= self._compared(sentence, words, parts)
        if loss.caption:
            assert words is not None and chosen is not None
            features["nll"] = self._unlikelihood(tokens, chosen, words.vectors, self.media(batch, frames), loss)
        if loss.label:
            logits, right = self.head(self.media(batch, frames)), self.learnt_labels(batch)
            smooth: dict[str, Any] = {"label_smoothing": loss.label_smoothing, "ignore_index": -1}
            features["nll"] = F.cross_entropy(logits, right, reduction="none", **smooth)
        return features

    def media(
        self, batch: Batch, frames: Tensor | None = None, audio_type: str = "", fixed: bool = False
    ) -> list[fusion.Sequence]:
        """What the head reads of the clips: sequences of frame vectors and segment vectors, as cfg.modalities says.

        frames (F, D): if they are there already; audio_type: not cfg.audio_type's tokens. fixed: the same size in any batch.
        """
        parts, room = [], (self.cfg.max_frames, self.spectrogram.max_segments) if fixed else (None, None)
        if "v" in self.cfg.modalities:
            frames = self.frame_vectors(batch) if frames is None else frames
            parts.append(fusion.sequence(fusion.VISION, frames, batch.frame_clip, len(batch), room[0]))
        if "a" in self.cfg.modalities:
            segments = self.segment_vectors(batch, audio_type or self.cfg.audio_type)
            parts.append(fusion.sequence(fusion.AUDIO, segments, batch.segment_clip, len(batch), room[1]))
        return parts

    def _compared(self, sentence: Tensor, words: fusion.Sequence | None, parts: list) -> dict[str, Tensor]:
        if not isinstance(self.head, fusion.LocalToLocal):
            return {"media": self.head(parts)}
        everyone = [
            fusion.Sequence(p.kind, distributed.gather_with_gradient(p.vectors), distributed.gather(p.there))
            for p in parts
        ]
        return {"scores": self.head(self.head.words(sentence, words), everyone)}

    def learnt_words(self, batch: Batch, loss: LossConfig) -> tuple[Tensor, Tensor]:
        """(tokens (B, L) of the captions, the places (B, L - 1) in them whose next token is learnt)."""
        tokens = batch.tokens
        if loss.padded_words:
            tokens = F.pad(tokens, (0, self.cfg.max_tokens - tokens.shape[1]))
        there = towers.words_there(self.text, tokens)[:, 1:]
        return tokens, (there | loss.padded_words) & batch.has_text[:, None]

    def learnt_labels(self, batch: Batch) -> Tensor:
        """The class (B,) of each clip, -1 where cfg.labels lacks its label or it has nothing of cfg.modalities."""
        there = (batch.has_frames & ("v" in self.cfg.modalities)) | (batch.has_audio & ("a" in self.cfg.modalities))
        numbers = {label: i for i, label in enumerate(self.cfg.labels)}
        named = torch.tensor([numbers.get(label_of(clip), -1) for clip in batch.meta], device=there.device)
        return named.masked_fill(~there, -1)

    def taught(self, batch: Batch, loss: LossConfig) -> Tensor:
        """How many words, or labels, this batch teaches."""
        return (self.learnt_words(batch, loss)[1] if loss.caption else self.learnt_labels(batch) >= 0).sum()

    def _unlikelihood(self, tokens: Tensor, chosen: Tensor, read: Tensor, parts: list, loss: LossConfig) -> Tensor:
        """Negative log-likelihood (B,) of the captions (7), the sum over chosen places; read (B, L, D): of the text tower."""
        words = fusion.Sequence(fusion.TEXT, read[:, :-1], towers.words_there(self.text, tokens)[:, 1:])
        scores = self.head(words, parts, chosen, self.text.token_embedding.weight)
        each = F.cross_entropy(scores, tokens[:, 1:][chosen], label_smoothing=loss.label_smoothing, reduction="none")
        return each.new_zeros(len(tokens)).index_add(0, chosen.nonzero()[:, 0], each)

    def grow(self, parts: list[fusion.Sequence], copies: int) -> Growing:
        """Captions that decoding.write lengthens, so many of each clip; parts: see media()."""
        return Growing(self.text, self.head, parts, copies)

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
        settings = {"model": self.cfg, "spectrogram": self.spectrogram, "frames": self.frames}
        return {"clip": self.clip_config} | {name: to_dict(cfg) for name, cfg in settings.items()}

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> Self:
        """The model of a checkpoint folder (model.safetensors and config.json), in fp32, in evaluation mode."""
        try:
            model = cls._of_folder(Path(folder))
        except UserError:
            raise
        except Exception as error:  # safetensors, open_clip and torch raise many kinds for what is damaged
            raise UserError(f"{folder}: not a readable checkpoint ({' '.join(str(error).split())[:200]})") from None
        return model.eval()

    @classmethod
    def _of_folder(cls, folder: Path) -> Self:
        file, weights = folder / "config.json", load_file(folder / "model.safetensors")
        tree = {"frames": {}} | parse_json(file.read_bytes())  # version 0.1.0 did not write frames
        cfg = from_tree(ModelConfig, tree["model"], file, "model.")
        spectrogram = from_tree(SpectrogramConfig, tree["spectrogram"], file, "spectrogram.")
        head = cfg.fusion not in ("global_global", "classifier")
        positions = cfg.max_tokens + cfg.max_frames + spectrogram.max_segments
        towers.must_be_backed(tree["clip"], weights, cfg.fusion_layers * head, positions * head)
        with towers.Undrawn():
            model = cls(tree["clip"], cfg, spectrogram, from_tree(FramesConfig, tree["frames"], file, "frames."))
        model.load_state_dict(weights)
        return model


def must_have_room(cfg: ModelConfig, fingerprint: dict[str, Any]) -> None:
    """UserError if a head has too few positions for the frames of shards with this fingerprint."""
    frames = fingerprint["frames"]["max_frames"]
    if cfg.fusion != "global_global" and frames > cfg.max_frames:
        raise UserError(f"model.max_frames={cfg.max_frames}: the shards have up to {frames} frames in a clip")


def uses_head(loss: LossConfig) -> bool:
    """Whether any of these losses runs the head."""
    return bool(loss.tm or loss.caption or loss.label)


def needed_towers(loss: LossConfig, modalities: str) -> list[str]:
    """The towers that these losses run, with media of these modalities."""
    needs = {
        "text": loss.at or loss.tv or loss.tm or loss.caption,
        "vision": loss.av or loss.tv or (uses_head(loss) and "v" in modalities),
        "audio": loss.at or loss.av or loss.aa or (uses_head(loss) and "a" in modalities),
    }
    return [name for name, needed in needs.items() if needed]


def pool(vectors: Tensor, clip: Tensor, clips: int) -> Tensor:
    """Unit vectors (clips, D), fp32: each vector (n, D) to unit length, mean by clip number (n,), to unit length again.

    Vectors of clip number `clips` are padding (Batch.padded).
    """
    unit = F.normalize(vectors.float(), dim=-1)
    total = unit.new_zeros(clips + 1, unit.shape[1]).index_add(0, clip, unit)[:clips]
    return F.normalize(total, dim=-1)
