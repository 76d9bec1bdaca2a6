"""Use a trained CLIP4VLA: from texts, sounds, videos and pictures to vectors, scores, captions and labels.

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
from huggingface_hub import ModelHubMixin, snapshot_download
from PIL import Image
from torch import Tensor

from clip4vla.config import ClassifyConfig, FramesConfig, RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.data import preprocessing
from clip4vla.data.preprocessing import ClipInput
from clip4vla.errors import UserError, one_line
from clip4vla.export import model_folder
from clip4vla.models import fusion, generation, towers
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.classifier import Classifier
from clip4vla.models.model import Model

File = str | os.PathLike
Wave = np.ndarray | Tensor
Sound = File | Wave | tuple[Wave, int]  # samples (T,) or (channels, T) in [-1, 1]; those and their Hz
Pictures = File | Wave | Image.Image  # frames (F, H, W, 3) uint8; a still
Clip = File | ClipInput | tuple[File | None, File | None]  # the pair: pictures, sound


class CLIP4VLA(Model, ModelHubMixin):
    """Encodes, compares, captions and classifies with a trained model; `.to(device)`, `.half()` and the like are torch's.

    Vectors come in fp32, on the model's device.

    Whatever cannot be read raises UserError, a ValueError of one line that names it.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's takes any further words, for __init__
        cls, name: File, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        revision: str | None = None, token: str | bool | None = None, cache_dir: File | None = None,
        local_files_only: bool = False, force_download: bool = False,
    ) -> "CLIP4VLA":  # fmt: skip
        """Load the model of a folder (exported, a checkpoint, or a run: its newest one) or of a hub id such as user/model.

        What follows dtype is huggingface_hub's, for a hub id.
        """
        words = {"cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download}
        folder = resolve_model_dir(name) or _downloaded(name, revision=revision, token=token, **words)
        return cls.from_checkpoint(folder).to(device=device, dtype=dtype).eval()

    def save_pretrained(  # type: ignore[override]  # config and card are the model's own
        self, save_directory: File, *, repo_id: str | None = None, push_to_hub: bool = False, config: Any = None,
        model_card_kwargs: Any = None, **push: Any,
    ) -> str | None:  # fmt: skip
        """Write a folder for from_pretrained, in the precision that the model has; what was there stays if that fails.

        A model card that is there already is kept. push_to_hub(id), and push_to_hub=True, send the same to the hub.
        """
        own = next((name for name, dtype in model_folder.DTYPES.items() if dtype == self.logit_scale.dtype), "fp32")
        model_folder.save_model_folder(self, Path(save_directory), dtype=own, replace=True)
        return self.push_to_hub(repo_id or Path(save_directory).name, **push) if push_to_hub else None

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Encode texts to unit vectors x^g (N, D); words beyond the model's max_tokens are not read."""
        return self.encode_texts(_texts(texts), self._tokenize)

    def encode_audio(
        self, sounds: Sound | list[Sound], rate: int | None = None, audio_type: str | float | None = None,
        whole: bool = True,
    ) -> Tensor:  # fmt: skip
        """Encode sounds to unit vectors z^g (N, D); zero for digital silence.

        rate: Hz of waveforms. audio_type: token vb, nb, both, or the share of NB in 0..1; None: as the model was trained.
        Of a sound longer than a clip (17.92 s with the defaults) windows of that length are encoded, one at a time in memory,
        and their mean is brought to unit length; whole=False takes its centre, as shard.py does.
        """
        token, listed, owners = self._token(audio_type), _listed(sounds), []

        def windows() -> Iterator[ClipInput]:
            for i, sound in enumerate(listed):
                for window in _windows(sound, rate, whole, self.spectrogram):
                    owners.append(i)
                    yield window

        vectors = self.encode(windows(), [token], vision=False)[token]
        total = vectors.new_zeros(len(listed), vectors.shape[1])
        return F.normalize(total.index_add(0, torch.tensor(owners, dtype=torch.int64), vectors), dim=-1).to(self.device)

    def encode_video(self, videos: Pictures | list[Pictures]) -> Tensor:
        """Encode videos and still pictures to unit vectors y^g (N, D).

        A video is encoded by frames spread over it, at most 12 with the defaults. Frames in an array are taken as they are,
        spread if there are more.
        """
        return self.encode((_video_input(video, self.frames) for video in _listed(videos)), [])["v"].to(self.device)

    @torch.no_grad()
    def encode(self, clips: Iterable[ClipInput], audio_types: Sequence[str], vision: bool = True) -> dict[str, Tensor]:
        """Encode clips to unit vectors (N, D), on the CPU: "v" y^g, and z^g under each type token; zero without that medium.

        Clips are read ahead in a thread, and few of them are in memory at a time.
        """
        names = ["v", *audio_types] if vision else audio_types
        chunks: dict[str, list[Tensor]] = {name: [torch.zeros(0, self.dim)] for name in names}
        for batch in preprocessing.batches(clips, self.spectrogram, self.frames):
            batch = batch.to(self.device)
            for name, vectors in chunks.items():
                pooled = self.pooled_frames(batch) if name == "v" else self.pooled_segments(batch, name)
                vectors.append(pooled.cpu())
        return {name: torch.cat(vectors) for name, vectors in chunks.items()}

    @torch.no_grad()
    def similarity(
        self, texts: str | Sequence[str] | Tensor, media: Clip | list[Clip] | Tensor,
        audio_type: str | float | None = None,
    ) -> Tensor:  # fmt: skip
        """Score N texts with M media, (N, M): cosines of vectors (N, D), (M, D); or of texts and files what the head gives.

        A model without a head for retrieval compares with the mean of a file's y^g and z^g, as global_global does. A file
        with nothing that the model reads has 0, with local_local minus infinity.
        """
        if isinstance(texts, Tensor) and isinstance(media, Tensor):
            return F.normalize(texts.float(), dim=-1) @ F.normalize(media.to(texts.device).float(), dim=-1).T
        if isinstance(texts, Tensor) or isinstance(media, Tensor):
            raise UserError("similarity: give vectors of both sides, or texts and files")
        head = self.head if isinstance(self.head, fusion.Head) else fusion.GlobalToGlobal(self.cfg)
        sentences = _texts(texts)
        columns = [torch.zeros(len(sentences), 0, device=self.device)]
        if isinstance(head, fusion.LocalToLocal):
            columns += [self._pairs(head, sentences, parts) for parts in self._parts(media, audio_type)]
        else:
            vectors = self.encode_text(sentences)
            columns += [vectors @ head(parts).float().T for parts in self._parts(media, audio_type)]
        return torch.cat(columns, 1)

    def _pairs(self, head: fusion.LocalToLocal, texts: list[str], parts: list[fusion.PaddedSequence]) -> Tensor:
        """Score each of N texts with each of B clips by the head, (N, B)."""
        rows = [torch.zeros(0, len(parts[0].mask), device=self.device)]
        rows += [head(head.words(*read), parts) for read in self.encode_texts_chunked(texts, self._tokenize)]
        nothing = ~torch.cat([part.mask for part in parts], 1).any(1)
        return torch.cat(rows).masked_fill(nothing, -torch.inf)

    @torch.no_grad()
    def caption(
        self, media: Clip | list[Clip], audio_type: str | float | None = None, seed: int = 0, **decode: Any
    ) -> list[str]:
        """Write a sentence for each file; decode: method, num_beams, top_p and the other settings of `decode`."""
        if self.cfg.head != "captioner":
            raise UserError(f"caption: this model has no captioner (model.head={self.cfg.head}): fine-tune one first")
        words = [f"decode.{name}={value}" for name, value in decode.items()]
        how = generation.resolve_max_tokens(load(RunConfig, None, words).decode, self.cfg.max_tokens)
        tokens, read = generation.special_tokens(self.cfg.clip)
        names, written = [_name(clip) for clip in _listed(media)], list[str]()
        for parts in self._parts(media, audio_type):
            some = names[len(written) : len(written) + len(parts[0].mask)]
            captions = generation.generate(partial(self.start_decoding, parts), some, how, tokens, seed)
            written += [read(numbers) for numbers in captions.tokens.tolist()]
        return written

    @torch.no_grad()
    def classify(
        self, media: Clip | list[Clip], labels: Sequence[str] | None = None, audio_type: str | float | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> Tensor:  # fmt: skip
        """Give probabilities (N, K) of labels: by their names in sentences (zero-shot), or without labels by the classifier.

        The classes of a classifier are `model.cfg.labels`. A clip without any medium has equal ones.
        """
        if labels is None:
            if not isinstance(self.head, Classifier):
                raise UserError("classify: name the labels; this model has no classifier that was trained on some")
            rows = [torch.zeros(0, len(self.cfg.labels), device=self.device)]
            return torch.cat(rows + [self.head(parts).softmax(1) for parts in self._parts(media, audio_type)])
        if isinstance(labels, str) or not len(labels):
            raise UserError("classify: labels are a list of names, one at least")
        sentences = [templates] if isinstance(templates, str) else templates or ClassifyConfig().templates
        names, head = self.class_vectors(self._tokenize, _texts(labels), sentences), fusion.GlobalToGlobal(self.cfg)
        scale = self.logit_scale.float().exp() if self.cfg.learn_temperature else 1 / self.cfg.temperature
        rows = [torch.zeros(0, len(names), device=self.device)]
        return torch.cat(
            rows + [(scale * head(p).float() @ names.T).softmax(1) for p in self._parts(media, audio_type)]
        )

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.logit_scale.device

    @property
    def dim(self) -> int:
        """Return D, the width of the common space."""
        return self.clip_config["embed_dim"]

    def _tokenize(self, texts: list[str]) -> Tensor:
        return towers.tokenizer(self.cfg.clip, self.cfg.max_tokens)(texts)

    def _token(self, audio_type: str | float | None) -> str:
        """Name the type token as type_token_weights takes it; UserError if it is none."""
        token = self.cfg.audio_type if audio_type is None else str(audio_type)
        type_token_weights(token, torch.zeros(0, dtype=torch.int64), "audio_type")
        return token

    def _parts(self, media: Clip | list[Clip], audio_type: str | float | None) -> Iterator[list[fusion.PaddedSequence]]:
        """Yield what the head reads of the clips, batch by batch: sequences (B, n, D) of frames and of segments."""
        token, clips = self._token(audio_type), (_fitting(_clip(clip, self), self) for clip in _listed(media))
        for batch in preprocessing.batches(clips, self.spectrogram, self.frames):
            yield [fusion.ensure_nonempty(part) for part in self.media(batch.to(self.device), audio_type=token)]


def resolve_model_dir(name: File) -> Path | None:
    """Find the folder with the weights of a model, or of the newest checkpoint of a run; None if there is no such folder."""
    folder = Path(name)
    runs = sorted(folder.glob("checkpoints/step-*/model.safetensors"))
    if runs and not (folder / "model.safetensors").is_file():
        return runs[-1].parent
    return folder if folder.is_dir() else None


def _downloaded(name: File, **words: Any) -> Path:
    """Download what the hub has under this name, and return its folder."""
    try:
        files = ["config.json", "model.safetensors", "README.md"]
        return Path(snapshot_download(str(name), allow_patterns=files, **words))
    except Exception as error:  # the hub's library and those below it raise many kinds
        why = one_line(error)
        raise UserError(f"{name}: no such folder, and the hub does not give a model of that name ({why})") from None


def _texts(texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in listed):
        raise UserError("texts are strings, one or a list of them")
    return listed


def _listed(items: Any) -> list:
    return items if isinstance(items, list) else [items]


def _name(clip: Clip) -> str:
    """Name a clip, for sampling its caption."""
    return "" if isinstance(clip, ClipInput) else str(clip)


def _clip(clip: Clip, model: Model) -> ClipInput:
    """Read those media of a clip that the model uses (cfg.modalities)."""
    kinds = model.cfg.modalities
    if isinstance(clip, ClipInput):
        return clip
    if not isinstance(clip, tuple):
        return _read(clip, model, kinds)
    both = zip(clip, "va", strict=True)
    visual, audio = (_read(path, model, kind) if path and kind in kinds else ClipInput() for path, kind in both)
    return ClipInput(visual.frames, audio.segments, audio.rows)


def _fitting(clip: ClipInput, model: Model) -> ClipInput:
    """Return the clip; UserError if the model's head has too few positions for it."""
    for kind, things, room in (
        ("frames", clip.frames, model.cfg.max_frames), ("segments", clip.segments, model.spectrogram.max_segments),
    ):  # fmt: skip
        if hasattr(model.head, "encoder") and things is not None and len(things) > room:
            raise UserError(f"a clip of {len(things)} {kind}: the model's head reads {room} at most")
    return clip


def _read(path: File, model: Model, kinds: str) -> ClipInput:
    with _naming(path):
        return preprocessing.read(path, model.spectrogram, model.frames, kinds)


@contextmanager
def _naming(what: Any) -> Iterator[None]:
    """Raise what is wrong with a medium as a UserError with its name."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {error}") from None


def _windows(sound: Sound, rate: int | None, whole: bool, spec: SpectrogramConfig) -> Iterator[ClipInput]:
    """Yield a sound as one clip, or as several if it is longer and `whole`."""
    if isinstance(sound, tuple):
        if len(sound) != 2 or not isinstance(sound[0], Wave):
            raise UserError("encode_audio: a tuple is a waveform and its rate in Hz; give several sounds as a list")
        sound, rate = sound
    with _naming(sound if isinstance(sound, File) else "a waveform"):
        if isinstance(sound, Wave):
            yield from preprocessing.windows_of(sound, rate, spec, whole)
        elif not isinstance(sound, File):
            raise ValueError(f"neither a file nor samples, but {type(sound).__name__}")
        elif whole:
            yield from (window for *_, window in preprocessing.windows(sound, spec))
        else:
            yield preprocessing.read(sound, spec, FramesConfig(), "a")


def _video_input(video: Pictures, frames: FramesConfig) -> ClipInput:
    with _naming(video if isinstance(video, File) else "a picture"):
        if isinstance(video, Image.Image):
            return preprocessing.of_image(video, frames.size)
        if isinstance(video, File):
            return preprocessing.read(video, SpectrogramConfig(), frames, "v")
        pixels = np.asarray(video.cpu() if isinstance(video, Tensor) else video)
        return preprocessing.of_frames(preprocessing.sample_uniformly(pixels, frames.max_frames), frames.size)
