"""Encode text, vision and audio by towers into one space, and pool frames and segments into clips."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from clip4vla.config import FramesConfig, LossConfig, MaskConfig, ModelConfig, SpectrogramConfig
from clip4vla.config_io import from_tree, parse_json, to_dict
from clip4vla.data.batch import Batch, upload
from clip4vla.distributed import collectives
from clip4vla.errors import UserError, one_line
from clip4vla.media.masking import masked_view
from clip4vla.media.spectrogram import decode, normalise
from clip4vla.models import fusion
from clip4vla.models.audio_encoder import AudioEncoder, type_token_weights
from clip4vla.models.audio_trunk import build_tower, must_be_held, tower_config
from clip4vla.models.captioner import CaptionDecoder, Captioner
from clip4vla.models.classifier import Classifier, in_words
from clip4vla.models.saved_config import FORMAT, upgraded
from clip4vla.towers.build import Undrawn, build_clip, freeze_first, hold_still
from clip4vla.towers.pictures import pictures_of
from clip4vla.towers.space import build_towers, check_claims, must_have_text
from clip4vla.towers.text import encode_text, gives_words, token_mask
from clip4vla.towers.transformers_folder import source_beside
from clip4vla.towers.vision import encode_images
from clip4vla.towers.weights import load_clip_weights

TEXTS = 256  # of a pass through the text tower


class Model(nn.Module):
    """Holds the three towers and the head, and computes what the losses need.

    clip: open_clip configuration of the towers; spectrogram, frames: as the shards it is trained on were made. audio: open_clip
    configuration of the audio tower, None: as cfg.audio_tower says.
    """

    text: Any  # towers as model.clip names them, or NoTower
    vision: Any
    head: Any  # as cfg.head names it: a Classifier, a Captioner, or one of fusion.py's
    pixel_statistics: Tensor

    def __init__(
        self,
        clip: dict[str, Any],
        cfg: ModelConfig,
        spectrogram: SpectrogramConfig,
        frames: FramesConfig | None = None,
        audio: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.clip_config, self.cfg, self.spectrogram = clip, cfg, spectrogram
        self.frames = frames or FramesConfig()
        self.text, self.vision = build_towers(clip, cfg.audio_tower)
        self.audio_config = audio or tower_config(cfg.audio_tower, clip["embed_dim"])
        own = build_tower(self.audio_config) if self.audio_config else self.vision
        self.audio = AudioEncoder(own, cfg, spectrogram, clip["embed_dim"])
        self.init_head()
        # 1-d: DeepSpeed broadcasts no scalars
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / cfg.temperature)]))
        self.pictures = pictures_of(cfg.clip, clip)
        pixels = 255 * torch.tensor([self.pictures.mean, self.pictures.std]).view(2, 3, 1, 1)  # of 0..255
        # the bits of fp32 numbers: .half() and DeepSpeed would round them
        self.register_buffer("pixel_statistics", pixels.view(torch.int32), persistent=False)

    def load_clip(self) -> bool:
        """Fill text and vision from the weights that cfg.clip names; False if it names none."""
        with torch.device("meta"):  # shapes alone: random weights would take a second, and the file's take their place
            built = build_clip(self.clip_config)
        loaded = load_clip_weights(built, self.cfg.clip)
        if loaded:
            self.text.load_state_dict(built.text.state_dict())
            self.vision.load_state_dict(built.visual.state_dict())
        return loaded

    def start_audio(self) -> None:
        """Initialise the audio tower from the weights that cfg.audio_tower names (or leave it fresh), as cfg.audio_init says."""
        if self.cfg.audio_init == "vision":
            tower = build_tower(self.audio_config, self.cfg.audio_tower) if self.audio_config else self.vision
            self.audio = AudioEncoder(tower, self.cfg, self.spectrogram, self.clip_config["embed_dim"])

    def init_head(self) -> None:
        """Make the head that cfg.head names; all but the classifier start from the text tower as it is now."""
        dim = self.clip_config["embed_dim"]
        if self.cfg.head not in ("global_global", "classifier"):
            must_have_text(self.text, self.cfg.head)
        if self.cfg.head == "classifier":
            self.head = Classifier(self.cfg, dim)
            return
        reads = self.cfg.head == "captioner" or (self.cfg.head == "local_local" and self.cfg.text_tokens == "all")
        if reads and not gives_words(self.text):
            raise UserError(
                f"model.head={self.cfg.head}: needs a text tower with outputs of all words, model.clip's gives sentences "
                "alone: take global_local, or local_local with model.text_tokens=eos"
            )
        start = Captioner if self.cfg.head == "captioner" else fusion.build
        self.head = start(self.text, self.cfg, dim, self.spectrogram.max_segments)

    def must_have_positions(self) -> None:
        """Raise UserError if captions may be longer than the text tower can read."""
        room = self.text.context_length
        if self.cfg.max_tokens > room:
            raise UserError(
                f"model.max_tokens={self.cfg.max_tokens}: the text tower of model.clip reads {room} at most; "
                f"set model.max_tokens={room}"
            )

    def freeze(self) -> None:
        """Leave trainable: the towers of cfg.trainable_towers less cfg.freeze_layers, the head, a temperature that is learned."""
        wanted = self.cfg.trainable_towers.split("+")
        for name in wanted:
            if name not in ("text", "vision", "audio"):
                raise UserError(f"model.trainable_towers: {name!r} is none of text, vision, audio (joined by +)")
        for name in ("text", "vision", "audio"):
            getattr(self, name).requires_grad_(name in wanted)
        for name, blocks in self.cfg.freeze_layers.items():
            if name not in wanted:
                raise UserError(f"model.freeze_layers: {name!r} is none of the towers of model.trainable_towers")
            freeze_first(self.audio.trunk if name == "audio" else getattr(self, name), blocks, name)
            if name == "audio":  # type tokens enter with the patches: else the gradient would pass the frozen blocks
                self.audio.type_embedding.requires_grad_(False)
        self.logit_scale.requires_grad_(self.cfg.learn_temperature)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; what may not change by itself stays in evaluation mode (hold_still)."""
        super().train(mode)
        for tower in (self.text, self.vision, self.audio.trunk):
            hold_still(tower)
        return self

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode tokens (B, L) to (x^g (B, D), all token outputs (B, L, D) or None), not normalised."""
        return encode_text(self.text, tokens)

    def encode_texts_chunked(
        self, texts: list[str], tokenize: Callable[[list[str]], Tensor], together: bool = False
    ) -> Iterator[tuple[Tensor, fusion.PaddedSequence]]:
        """Encode n <= TEXTS texts at a time, so that memory is bounded: (x^g (n, D), not normalised, word outputs (n, L, D)).

        tokenize: see tokenizer. together: all ranks call this, each with its own texts, and run as many passes (ZeRO-3).
        """
        passes = -(-len(texts) // TEXTS)
        for k in range(max(collectives.all_gather_objects(passes)) if together else passes):
            some = texts[k * TEXTS : (k + 1) * TEXTS]
            tokens = tokenize(some or [""])
            sentence, words = self.encode_tokens(upload(tokens, self.logit_scale.device))
            if words is None:  # of a tower that gives none
                words, tokens = sentence[:, None, :][:, :0], tokens[:, :0]
            if some:
                yield sentence, self._words(words, tokens)

    def _words(self, outputs: Tensor, tokens: Tensor) -> fusion.PaddedSequence:
        """Mark which of the text tower's outputs (B, L, D) are of words of tokens (B, L), which are on the CPU.

        Those after max_tokens are none: some towers read padding to the end.
        """
        outputs, mask = outputs[:, : self.cfg.max_tokens], token_mask(self.text, tokens)[:, : self.cfg.max_tokens]
        return fusion.PaddedSequence(fusion.TEXT, outputs, upload(mask, outputs.device), mask.sum(1))

    def encode_texts(self, texts: list[str], tokenize: Callable[[list[str]], Tensor], together: bool = False) -> Tensor:
        """Encode any number of texts to x^g (N, D), unit length, fp32; tokenize, together: see encode_texts_chunked."""
        none = self.logit_scale.new_zeros(0, self.clip_config["embed_dim"])
        chunks = [sentence for sentence, _ in self.encode_texts_chunked(texts, tokenize, together)]
        return F.normalize(torch.cat([none, *chunks]).float(), dim=-1)

    def class_vectors(
        self, tokenize: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str]
    ) -> Tensor:
        """Encode classes to unit vectors (K, D): the mean over a class's sentences, each brought to unit length first."""
        texts = [template.replace("{}", in_words(label)) for label in classes for template in templates]
        sentences = self.encode_texts(texts, tokenize)
        return F.normalize(sentences.view(len(classes), len(templates), -1).mean(1), dim=-1)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Encode RGB frames (F, 3, H, W) in 0..255 to vectors (F, D), not normalised."""
        if not len(frames):  # open_clip's tower fails on none, and under ZeRO-3 all ranks must run it
            return self.encode_frames(frames.new_zeros(1, *frames.shape[1:]))[:0]
        mean, std = self.pixel_statistics.view(torch.float32)
        dtype = next((weight.dtype for weight in self.vision.parameters()), None)  # a space has no tower, and says so
        return encode_images(self.vision, ((frames.float() - mean) / std).to(dtype))

    def encode_segments(self, segments: Tensor, mix: Tensor) -> Tensor:
        """Encode normalised segments (S, C, 224, 224) to vectors (S, D), not normalised; mix: see type_token_weights."""
        return self.audio(segments.to(self.audio.type_embedding.dtype), mix)

    def audio_vectors(self, batch: Batch, audio_type: str) -> tuple[Tensor, Tensor]:
        """Encode a batch's sound under a type token to (vectors (n, D), not normalised, their clips (n,)).

        A vector for each segment, or for each clip that has some, as cfg.audio_span says: audio_counts tells how many.
        """
        decibels = decode(batch.segments, self.spectrogram)
        view = normalise(decibels, batch.segment_rows, self.cfg.spectrogram_norm, batch.segment_clip, len(batch))
        (vectors,), owner = self._encode_views([view], batch, audio_type)
        return vectors, owner

    def _encode_views(self, views: list[Tensor], batch: Batch, audio_type: str) -> tuple[tuple[Tensor, ...], Tensor]:
        """Encode normalised views (S, C, 224, 224) of a batch's segments in one pass: (vectors (n, D) of each, their clips)."""
        if self.cfg.audio_span == "segment":
            mix = type_token_weights(audio_type, batch.segment_type)
            mix = mix.expand(len(batch.segments), -1, -1).repeat(len(views), 1, 1)
            return self.encode_segments(torch.cat(views), mix).chunk(len(views)), batch.segment_clip
        mix = type_token_weights(audio_type, batch.audio_type)
        views = [view.to(self.audio.type_embedding.dtype) for view in views]
        vectors = self.audio.encode_clips(views, batch.on_host.segment_rows, batch.segment_counts, mix)
        owner = upload(batch.on_host.has_audio.nonzero()[:, 0], mix.device)
        return tuple(x[owner] for x in vectors), owner

    def audio_counts(self, batch: Batch) -> Tensor:
        """Count the vectors of each clip that audio_vectors gives, (B,) int64 on the CPU."""
        return batch.segment_counts if self.cfg.audio_span == "segment" else batch.on_host.has_audio.long()

    def frame_vectors(self, batch: Batch) -> Tensor:
        """Encode a batch's frames to vectors (F, D), or take embed.py's if it has them."""
        return self.encode_frames(batch.frames) if batch.frame_vectors is None else batch.frame_vectors

    def caption_vectors(self, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode tokens (B, L) to (x^g (B, D), not normalised, all outputs (B, L, D)); or take embed.py's x^g alone, if there."""
        return self.encode_tokens(tokens) if batch.text_vectors is None else (batch.text_vectors, None)

    def pooled_segments(self, batch: Batch, audio_type: str) -> Tensor:
        """Encode and pool a batch's segments under a type token to z^g (B, D), unit length; zero where a clip has no audio."""
        return pool(*self.audio_vectors(batch, audio_type), len(batch))

    def pooled_frames(self, batch: Batch) -> Tensor:
        """Encode and pool a batch's frames to y^g (B, D), unit length; zero where a clip has no frames."""
        return pool(self.frame_vectors(batch), batch.frame_clip, len(batch))

    def forward(self, batch: Batch, loss: LossConfig, mask: MaskConfig) -> dict[str, Tensor]:
        """Compute what the losses with a weight need, and `scale` = 1 / temperature.

        That is: unit vectors (B, D) text, vision, audio, masked; media (B, D) as the head gives them, or its scores (B, N)
        of own captions and the clips of all ranks; or, of each clip (B,), the negative log-likelihood `nll` of its caption's
        words or of its label.
        """
        # logit_scale may be bf16
        fixed = torch.full_like(self.logit_scale, 1 / self.cfg.temperature, dtype=torch.float32)
        features = {"scale": self.logit_scale.float().exp() if self.cfg.learn_temperature else fixed}
        if loss.at or loss.tv or loss.tm or loss.caption:
            tokens = upload(self.caption_targets(batch, loss)[0], batch.tokens.device) if loss.caption else batch.tokens
            with torch.set_grad_enabled(self._trains(self.text)):
                sentence, outputs = self.caption_vectors(batch, tokens)
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
            of_one_size = isinstance(self.head, fusion.LocalToLocal) and collectives.world_size() > 1
            parts = self.media(batch, frames, fixed=of_one_size)
            words = None if outputs is None else self._words(outputs, batch.on_host.tokens)
            features |= self._compared(sentence, words, parts)
        if loss.caption:
            assert outputs is not None
            features["nll"] = self.caption_nll(batch, outputs, self.media(batch, frames), loss)
        if loss.label:
            features["nll"] = self.head.nll(self.head(self.media(batch, frames)), batch, loss.label_smoothing)
        return features

    def media(
        self, batch: Batch, frames: Tensor | None = None, audio_type: str = "", fixed: bool = False
    ) -> list[fusion.PaddedSequence]:
        """Encode what the head reads of the clips: sequences (B, n, D) of frames and of segments, as cfg.modalities says.

        frames (F, D): if they are there already; audio_type: not cfg.audio_type's tokens. fixed: the same size in any batch.
        """
        parts, room = [], (self.cfg.max_frames, self.spectrogram.max_segments) if fixed else (None, None)
        if "v" in self.cfg.modalities:
            frames = self.frame_vectors(batch) if frames is None else frames
            parts.append(fusion.pad_packed(fusion.VISION, frames, batch.frame_counts, room[0]))
        if "a" in self.cfg.modalities:
            vectors, _ = self.audio_vectors(batch, audio_type or self.cfg.audio_type)
            parts.append(fusion.pad_packed(fusion.AUDIO, vectors, self.audio_counts(batch), room[1]))
        return parts

    def _compared(self, sentence: Tensor, words: fusion.PaddedSequence | None, parts: list) -> dict[str, Tensor]:
        if not isinstance(self.head, fusion.LocalToLocal):
            return {"media": self.head(parts)}
        return {"scores": self.head(self.head.words(sentence, words), [fusion.gather_sequence(part) for part in parts])}

    def caption_targets(self, batch: Batch, loss: LossConfig) -> tuple[Tensor, Tensor]:
        """Select (tokens (B, L) of the captions, the positions (B, L - 1) in them whose next token is learnt), on the CPU."""
        batch = batch.on_host
        tokens = batch.tokens
        if loss.train_on_padding:
            tokens = F.pad(tokens, (0, self.cfg.max_tokens - tokens.shape[1]))
        there = token_mask(self.text, tokens)[:, 1:]
        return tokens, (there | loss.train_on_padding) & batch.has_text[:, None]

    def num_targets(self, batch: Batch, loss: LossConfig) -> Tensor:
        """Count the words, or clips with labels, that this batch teaches; a scalar on the CPU."""
        if loss.caption:
            return self.caption_targets(batch, loss)[1].sum()
        return self.head.targets(batch, batch.meta).any(1).sum()

    def caption_nll(self, batch: Batch, outputs: Tensor, parts: list, loss: LossConfig) -> Tensor:
        """Compute the captions' negative log-likelihood (B,) (7), summed over chosen positions; outputs (B, L, D): of words."""
        tokens, chosen = self.caption_targets(batch, loss)
        words = self._words(outputs, tokens)
        words = words._replace(vectors=words.vectors[:, :-1], mask=words.mask[:, 1:])
        scores = self.head(words, parts, chosen, self.text.token_embedding.weight)
        targets, owner = (upload(x, scores.device) for x in (tokens[:, 1:][chosen], chosen.nonzero()[:, 0]))
        each = F.cross_entropy(scores, targets, label_smoothing=loss.label_smoothing, reduction="none")
        return each.new_zeros(len(tokens)).index_add(0, owner, each)

    def start_decoding(self, parts: list[fusion.PaddedSequence], copies: int) -> CaptionDecoder:
        """Start captions, `copies` of each clip, for generation.generate to lengthen; parts: see media()."""
        return CaptionDecoder(self.text, self.head, parts, copies)

    def _audio_views(self, batch: Batch, loss: LossConfig, mask: MaskConfig) -> dict[str, Tensor]:
        """Encode the segments to z^g (B, D) and, for NCE_aa, that of the masked view, in one pass through the tower."""
        decibels = decode(batch.segments, self.spectrogram)
        clips = batch.segment_clip, len(batch)
        views = [normalise(decibels, batch.segment_rows, self.cfg.spectrogram_norm, *clips)]
        if loss.aa:
            hidden = batch.hidden_rows[:, :, None] | batch.hidden_channels[:, None, :]
            views.append(masked_view(decibels, batch.segment_rows, hidden, mask, self.cfg.spectrogram_norm, *clips))
        vectors, owner = self._encode_views(views, batch, self.cfg.pretrain_audio_type)
        return dict(zip(("audio", "masked"), (pool(v, owner, len(batch)) for v in vectors), strict=False))

    def _trains(self, tower: nn.Module) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())

    def config(self) -> dict[str, Any]:
        """Collect everything that from_checkpoint needs beside the weights."""
        settings = {"model": self.cfg, "spectrogram": self.spectrogram, "frames": self.frames}
        audio = {"audio": self.audio_config} if self.audio_config else {}
        return {"format": FORMAT, "clip": self.clip_config} | audio | {k: to_dict(cfg) for k, cfg in settings.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}log_scale" in state_dict:  # its name in format 1
            state_dict[f"{prefix}logit_scale"] = state_dict.pop(f"{prefix}log_scale")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> Self:
        """Load the model of a checkpoint folder (model.safetensors and config.json), in fp32, in evaluation mode."""
        try:
            model = cls._of_folder(Path(folder))
        except UserError:
            raise
        except Exception as error:  # safetensors, open_clip and torch raise many kinds for what is corrupt
            raise UserError(f"{folder}: not a readable checkpoint ({one_line(error)})") from None
        return model.eval()

    @classmethod
    def _of_folder(cls, folder: Path) -> Self:
        file, weights = folder / "config.json", load_file(folder / "model.safetensors")
        tree = upgraded({"frames": {}} | parse_json(file.read_bytes()), file)  # version 0.1.0 did not write frames
        cfg = from_tree(ModelConfig, tree["model"], file, "model.")
        cfg.clip = source_beside(cfg.clip, folder)
        spectrogram = from_tree(SpectrogramConfig, tree["spectrogram"], file, "spectrogram.")
        head = cfg.head not in ("global_global", "classifier")
        positions = cfg.max_tokens + cfg.max_frames + spectrogram.max_segments
        check_claims(tree["clip"], weights, cfg.head_layers * head, positions * head)
        must_be_held(tree.get("audio"), cfg.audio_tower, weights)
        frames = from_tree(FramesConfig, tree["frames"], file, "frames.")
        with Undrawn():
            model = cls(tree["clip"], cfg, spectrogram, frames, tree.get("audio"))
        model.load_state_dict(weights)
        return model


def uses_head(loss: LossConfig) -> bool:
    """Tell whether any of these losses runs the head."""
    return bool(loss.tm or loss.caption or loss.label)


def needed_towers(loss: LossConfig, modalities: str) -> list[str]:
    """List the towers that these losses run, with media of these modalities."""
    needs = {
        "text": loss.at or loss.tv or loss.tm or loss.caption,
        "vision": loss.av or loss.tv or (uses_head(loss) and "v" in modalities),
        "audio": loss.at or loss.av or loss.aa or (uses_head(loss) and "a" in modalities),
    }
    return [name for name, needed in needs.items() if needed]


def pool(vectors: Tensor, clip: Tensor, clips: int) -> Tensor:
    """Pool vectors (n, D) to unit vectors (clips, D), fp32: to unit length, mean by clip number (n,), to unit length again.

    Vectors of clip number `clips` are padding (Batch.padded).
    """
    unit = F.normalize(vectors.float(), dim=-1)
    total = unit.new_zeros(clips + 1, unit.shape[1]).index_add(0, clip, unit)[:clips]
    return F.normalize(total, dim=-1)
