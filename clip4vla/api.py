"""CLIP4VLA as others use it: texts, sounds, videos and pictures in; vectors, scores, captions and labels out.

Needs neither DeepSpeed nor DALI, wandb or webdataset. Notation: N clips or texts, K classes, D width of the common space.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from PIL import Image
from torch import Tensor

from clip4vla import decoding, fusion, inputs, model_card, towers, weights
from clip4vla.audio_encoder import type_mix
from clip4vla.classifier import Classifier, class_vectors
from clip4vla.config import ClassifyConfig, FramesConfig, RunConfig, SpectrogramConfig, UserError
from clip4vla.inputs import Input
from clip4vla.model import Model
from clip4vla.settings import load

File = str | os.PathLike[str]
Wave = np.ndarray | Tensor
Sound = File | Wave | tuple[Wave, int]  # samples (T,) or (channels, T) in [-1, 1]; those and their Hz
Pictures = File | Wave | Image.Image  # frames (F, H, W, 3) uint8; a still
Clip = File | Input | tuple[File | None, File | None]  # the pair: pictures, sound


class CLIP4VLA(Model, ModelHubMixin):
    """A trained model. `.to(device)`, `.half()` and the like are torch's; vectors come in fp32, on the model's device.

    Whatever cannot be read raises UserError, a ValueError of one line that names it.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's takes any further words for __init__
        cls, name: File, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        **download: Any,
    ) -> "CLIP4VLA":  # fmt: skip
        """The model of a folder (exported, a checkpoint, or a run: its newest one) or of a hub id such as user/model.

        download: revision, token, cache_dir, local_files_only, force_download of huggingface_hub.
        """
        return cls.from_checkpoint(_found(name, download)).to(device=device, dtype=dtype).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """What the mixin's save_pretrained(folder) and push_to_hub(id) write, in the precision that the model has."""
        own = next((name for name, dtype in weights.DTYPES.items() if dtype == self.log_scale.dtype), "fp32")
        weights.write(self, save_directory, dtype=own, replace=True)

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit vectors x^g (N, D); words beyond the model's max_tokens are not read."""
        return self.sentence_vectors(_texts(texts), self._tokenize)

    def encode_audio(
        self, sounds: Sound | list[Sound], rate: int | None = None, audio_type: str | float | None = None,
        whole: bool = True,
    ) -> Tensor:  # fmt: skip
        """Unit vectors z^g (N, D); zero for digital silence.

        rate: Hz of waveforms. audio_type: token vb, nb, both, or the share of NB in 0..1; None: as the model was trained.
        Of a sound longer than a clip (17.92 s with the defaults) windows of that length are encoded, one at a time in memory,
        and their mean is brought to unit length; whole=False takes its centre, as shard.py does.
        """
        token, listed, owners = self._token(audio_type), _listed(sounds), []

        def windows() -> Iterator[Input]:
            for i, sound in enumerate(listed):
                for window in _windows(sound, rate, whole, self.spectrogram):
                    owners.append(i)
                    yield window

        found = self.encode(windows(), [token], vision=False)[token]
        total = found.new_zeros(len(listed), found.shape[1])
        return F.normalize(total.index_add(0, torch.tensor(owners, dtype=torch.int64), found), dim=-1).to(self.device)

    def encode_video(self, videos: Pictures | list[Pictures]) -> Tensor:
        """Unit vectors y^g (N, D) of videos, by at most 12 frames spread over each with the defaults, and of still pictures."""
        return self.encode((_seen(video, self.frames) for video in _listed(videos)), [])["v"].to(self.device)

    @torch.no_grad()
    def encode(self, clips: Iterable[Input], audio_types: Sequence[str], vision: bool = True) -> dict[str, Tensor]:
        """Unit vectors (N, D), on the CPU: "v" y^g, and z^g under each type token; zero where a clip has no such medium.

        Clips are read ahead in a thread, and few of them are in memory at a time.
        """
        found: dict[str, list[Tensor]] = {name: [torch.zeros(0, self.dim)] for name in ["v"] * vision + [*audio_types]}
        for batch in inputs.batches(clips, self.spectrogram, self.frames):
            batch = batch.to(self.device)
            for name, parts in found.items():
                pooled = self.pooled_frames(batch) if name == "v" else self.pooled_segments(batch, name)
                parts.append(pooled.cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    @torch.no_grad()
    def similarity(
        self, texts: str | Sequence[str] | Tensor, media: Clip | list[Clip] | Tensor,
        audio_type: str | float | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores (N, M) of texts and media: cosines of vectors (N, D), (M, D); or of texts and files what the head gives.

        A model without a head for retrieval compares with the mean of a file's y^g and z^g, as global_global does.
        """
        if isinstance(texts, Tensor) and isinstance(media, Tensor):
            return F.normalize(texts.float(), dim=-1) @ F.normalize(media.float(), dim=-1).T
        if isinstance(texts, Tensor) or isinstance(media, Tensor):
            raise UserError("similarity: give vectors of both sides, or texts and files")
        head = self.head if isinstance(self.head, fusion.Head) else fusion.GlobalToGlobal(self.cfg)
        if isinstance(head, fusion.LocalToLocal):
            tokens = self._tokenize(_texts(texts)).to(self.device)
            sentence, words = self.encode_tokens(tokens)
            read = head.words(sentence, fusion.Sequence(fusion.TEXT, words, towers.words_there(self.text, tokens)))
            return torch.cat([head(read, parts) for parts in self._parts(media, audio_type)], 1)
        sentence = self.encode_text(texts)
        return torch.cat([sentence @ head(parts).float().T for parts in self._parts(media, audio_type)], 1)

    @torch.no_grad()
    def caption(
        self, media: Clip | list[Clip], audio_type: str | float | None = None, seed: int = 0, **decode: Any
    ) -> list[str]:
        """A sentence for each file; decode: method, beams, top_p and the other settings of `decode`, beam search by default."""
        if self.cfg.fusion != "captioner":
            raise UserError(
                f"caption: this model has no captioner (model.fusion={self.cfg.fusion}): fine-tune one first"
            )
        words = [f"decode.{name}={value}" for name, value in decode.items()]
        how = decoding.within(load(RunConfig, None, words).decode, self.cfg.max_tokens)
        tokens, read = decoding.tokens_of(self.cfg.clip)
        names, written = [_name(clip) for clip in _listed(media)], list[str]()
        for parts in self._parts(media, audio_type):
            some = names[len(written) : len(written) + len(parts[0].there)]
            found = decoding.write(partial(self.grow, parts), some, how, tokens, seed)
            written += [read(numbers) for numbers in found.tokens.tolist()]
        return written

    @torch.no_grad()
    def classify(
        self, media: Clip | list[Clip], labels: Sequence[str] | None = None, audio_type: str | float | None = None,
        templates: Sequence[str] | None = None,
    ) -> Tensor:  # fmt: skip
        """Probabilities (N, K) of labels: by their names in sentences (zero-shot), or without labels by a trained classifier.

        The classes of a classifier are `model.cfg.labels`. A clip without any medium has equal ones.
        """
        if labels is None:
            if not isinstance(self.head, Classifier):
                raise UserError("classify: name the labels; this model has no classifier that was trained on some")
            return torch.cat([self.head(parts).softmax(1) for parts in self._parts(media, audio_type)])
        names = class_vectors(self, self._tokenize, labels, templates or ClassifyConfig().templates)
        head = fusion.GlobalToGlobal(self.cfg)
        scale = self.log_scale.float().exp() if self.cfg.learn_temperature else 1 / self.cfg.temperature
        return torch.cat([(scale * head(p).float() @ names.T).softmax(1) for p in self._parts(media, audio_type)])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_scale.device

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What save_pretrained writes as README.md."""
        return model_card.card(self)

    @property
    def dim(self) -> int:
        """D, the width of the common space."""
        return self.clip_config["embed_dim"]

    def _tokenize(self, texts: list[str]) -> Tensor:
        return towers.tokenizer(self.cfg.clip, self.cfg.max_tokens)(texts)

    def _token(self, audio_type: str | float | None) -> str:
        """As type_mix takes it; UserError if it is none."""
        token = self.cfg.audio_type if audio_type is None else str(audio_type)
        type_mix(token, torch.zeros(0, dtype=torch.int64), "audio_type")
        return token

    def _parts(self, media: Clip | list[Clip], audio_type: str | float | None) -> Iterator[list[fusion.Sequence]]:
        """What the head reads of the clips, by batches."""
        token, clips = self._token(audio_type), (_clip(clip, self) for clip in _listed(media))
        for batch in inputs.batches(clips, self.spectrogram, self.frames):
            yield self.media(batch.to(self.device), audio_type=token)


def _found(name: File, download: dict[str, Any]) -> Path:
    """The folder with the weights; from the hub if there is no such folder, and the name may be one there."""
    folder = Path(name)
    if folder.is_dir():
        runs = sorted(folder.glob("checkpoints/step-*/model.safetensors"))
        return runs[-1].parent if runs and not (folder / "model.safetensors").is_file() else folder
    try:
        files = ["config.json", "model.safetensors", "README.md"]
        return Path(snapshot_download(str(name), allow_patterns=files, **download))
    except Exception as error:  # the hub's library and those below it raise many kinds
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: no such folder, and the hub does not give a model of that name ({why})") from None


def _texts(texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in listed):
        raise UserError("texts are strings, one or a list of them")
    return listed


def _listed(items: Any) -> list:
    return items if isinstance(items, list) else [items]


def _name(clip: Clip) -> str:
    """What names a clip, for sampling."""
    return "" if isinstance(clip, Input) else str(clip)


def _clip(clip: Clip, model: Model) -> Input:
    """The media of a clip that the model reads (cfg.modalities)."""
    kinds = model.cfg.modalities
    if isinstance(clip, Input):
        return clip
    if not isinstance(clip, tuple):
        return _read(clip, model, kinds)
    both = zip(clip, "va", strict=True)
    seen, heard = (_read(path, model, kind) if path and kind in kinds else Input() for path, kind in both)
    return Input(seen.frames, heard.segments, heard.rows)


def _read(path: File, model: Model, kinds: str) -> Input:
    with _naming(path):
        return inputs.read(path, model.spectrogram, model.frames, kinds)


@contextmanager
def _naming(what: Any) -> Iterator[None]:
    """What is wrong with a medium, with its name."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def _windows(sound: Sound, rate: int | None, whole: bool, spec: SpectrogramConfig) -> Iterator[Input]:
    """One clip, or if the sound is longer and `whole` several."""
    if isinstance(sound, tuple):
        sound, rate = sound
    with _naming(sound if isinstance(sound, str | os.PathLike) else "a waveform"):
        if isinstance(sound, str | os.PathLike):
            if whole:
                yield from (window for *_, window in inputs.windows(sound, spec))
            else:
                yield inputs.read(sound, spec, FramesConfig(), "a")
        else:
            yield from inputs.windows_of(torch.as_tensor(sound), rate, spec, whole)


def _seen(video: Pictures, frames: FramesConfig) -> Input:
    if isinstance(video, Image.Image):
        return inputs.of_image(video, frames.size)
    if not isinstance(video, str | os.PathLike):
        with _naming("encode_video"):
            return inputs.of_frames(np.asarray(video), frames.size)
    with _naming(video):
        return inputs.read(video, SpectrogramConfig(), frames, "v")
