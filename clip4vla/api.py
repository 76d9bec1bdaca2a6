"""Use a trained CLIP4VLA: from texts, sounds, videos and pictures to vectors, scores, captions and labels.

Needs neither DeepSpeed nor DALI, wandb or webdataset. Notation: N clips or texts, K classes, D width of the common space.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
from clip4vla.config_io import expand_path, load
from clip4vla.data import preprocessing
from clip4vla.data.batch import upload
from clip4vla.data.preprocessing import ClipInput
from clip4vla.errors import UserError, one_line
from clip4vla.export import model_folder
from clip4vla.models import fusion, generation
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.classifier import Classifier
from clip4vla.models.model import Model
from clip4vla.towers.space import NoTower
from clip4vla.towers.tokenizer import tokenizer
from clip4vla.towers.transformers_folder import SMALL, SOURCE

File = str | os.PathLike
Wave = np.ndarray | Tensor
Sound = File | Wave | tuple[Wave, int]  # samples (T,) or (channels, T) in [-1, 1]; those and their Hz
Pictures = File | Wave | Image.Image  # frames (F, H, W, 3) uint8; a still
Clip = File | ClipInput | tuple[File | None, File | None]  # the pair: pictures, sound


class CLIP4VLA(Model, ModelHubMixin):
    """Encodes, compares, captions and classifies with a trained model; `.to(device)`, `.half()` and the like are torch's.

    Vectors come in fp32, on the model's device.

    Whatever cannot be read or written, and what is no such argument, raises UserError, a ValueError of one line that names it.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's takes any further words, for __init__
        cls, name: File, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        revision: str | None = None, token: str | bool | None = None, cache_dir: File | None = None,
        local_files_only: bool = False, force_download: bool = False,
    ) -> "CLIP4VLA":  # fmt: skip
        """Load the model of a folder (exported, a checkpoint, or a run: its newest one) or of a hub id such as user/model.

        In a folder's path ~ and $VARIABLES are expanded. What follows dtype is huggingface_hub's, for a hub id.
        """
        name, cache_dir = _expanded(name), None if cache_dir is None else _expanded(cache_dir)
        words = {"cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download}
        folder = resolve_model_dir(name) or _downloaded(name, revision=revision, token=token, **words)
        model = cls.from_checkpoint(folder)
        try:
            return model.to(device=device, dtype=dtype).eval()
        except (RuntimeError, TypeError, AssertionError) as error:  # torch's, of no such device, type, or room on it
            raise UserError(f"device={device}, dtype={dtype}: {one_line(error)}") from None

    def save_pretrained(  # type: ignore[override]  # config and card are the model's own
        self, save_directory: File, *, repo_id: str | None = None, push_to_hub: bool = False, config: Any = None,
        model_card_kwargs: Any = None, **push: Any,
    ) -> str | None:  # fmt: skip
        """Write a folder for from_pretrained, in the precision that the model has; what was there stays if that fails.

        A model card that is there already is kept. push_to_hub(id), and push_to_hub=True, send the same to the hub.
        """
        own = next((name for name, dtype in model_folder.DTYPES.items() if dtype == self.logit_scale.dtype), "fp32")
        folder = Path(_expanded(save_directory))
        try:
            model_folder.save_model_folder(self, folder, dtype=own, replace=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
        return self.push_to_hub(repo_id or folder.name, **push) if push_to_hub else None

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
        pooled = F.normalize(total.index_add(0, torch.tensor(owners, dtype=torch.int64), vectors), dim=-1)
        return upload(pooled, self.device)

    def encode_video(self, videos: Pictures | list[Pictures]) -> Tensor:
        """Encode videos and still pictures to unit vectors y^g (N, D).

        A video is encoded by frames spread over it, at most 12 with the defaults. Frames in an array are taken as they are,
        spread if there are more.
        """
        if isinstance(self.vision, NoTower):
            self.vision(torch.zeros(0))
        inputs = (_video_input(video, self) for video in _listed(videos))
        return upload(self.encode(inputs, [])["v"], self.device)

    @torch.no_grad()
    def encode(self, clips: Iterable[ClipInput], audio_types: Sequence[str], vision: bool = True) -> dict[str, Tensor]:
        """Encode clips to unit vectors (N, D), on the CPU: "v" y^g, and z^g under each type token; zero without that medium.

        "v" is zero where the model has no vision tower (model.clip=vectors:NAME).

        Clips are read ahead in a thread, and few of them are in memory at a time.
        """
        if isinstance(audio_types, str) or not all(isinstance(name, str) for name in _several(audio_types)):
            raise UserError(f"encode: audio_types are a list of type tokens, not {audio_types!r}")
        names = ["v", *audio_types] if vision else audio_types
        chunks: dict[str, list[Tensor]] = {name: [torch.zeros(0, self.dim)] for name in names}
        whole = (_whole(clip, self) for clip in _several(clips))
        for batch in preprocessing.batches(whole, self.spectrogram, self.pictures):
            batch = batch.to(self.device)
            for name, vectors in chunks.items():
                if name == "v":
                    unseen = isinstance(self.vision, NoTower)
                    pooled = torch.zeros(len(batch), self.dim) if unseen else self.pooled_frames(batch)
                else:
                    pooled = self.pooled_segments(batch, name)
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
            if texts.ndim != 2 or media.ndim != 2 or texts.shape[1] != media.shape[1]:
                raise UserError(
                    f"similarity: vectors are (N, D) and (M, D), not {(*texts.shape,)} and {(*media.shape,)}"
                )
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
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"caption: the seed is a whole number from 0 on, not {seed!r}")
        words = [f"decode.{name}={value}" for name, value in decode.items()]
        how = generation.resolve_max_tokens(load(RunConfig, None, words).decode, self.cfg.max_tokens)
        tokens, read = generation.special_tokens(self.cfg.clip, self.clip_config)
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
        if isinstance(labels, str) or not (classes := _texts(labels)):
            raise UserError("classify: labels are a list of names, one at least")
        sentences = _texts(templates or ClassifyConfig().templates)
        names, head = self.class_vectors(self._tokenize, classes, sentences), fusion.GlobalToGlobal(self.cfg)
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
        return tokenizer(self.cfg.clip, self.cfg.max_tokens, self.clip_config)(texts)

    def _token(self, audio_type: str | float | None) -> str:
        """Name the type token as type_token_weights takes it; UserError if it is none."""
        token = self.cfg.audio_type if audio_type is None else str(audio_type)
        type_token_weights(token, torch.zeros(0, dtype=torch.int64), "audio_type")
        return token

    def _parts(self, media: Clip | list[Clip], audio_type: str | float | None) -> Iterator[list[fusion.PaddedSequence]]:
        """Yield what the head reads of the clips, batch by batch: sequences (B, n, D) of frames and of segments."""
        token, clips = self._token(audio_type), (_fitting(_clip(clip, self), self) for clip in _listed(media))
        for batch in preprocessing.batches(clips, self.spectrogram, self.pictures):
            yield [fusion.ensure_nonempty(part) for part in self.media(batch.to(self.device), audio_type=token)]


def resolve_model_dir(name: File) -> Path | None:
    """Find the folder with the weights of a model, or of the newest checkpoint of a run; None if there is no such folder."""
    folder = Path(name)
    if not os.path.isdir(folder):  # Path's own raises OSError for a name that is too long
        return None
    runs = sorted(folder.glob("checkpoints/step-*/model.safetensors"))
    return runs[-1].parent if runs and not (folder / "model.safetensors").is_file() else folder


def _downloaded(name: File, **words: Any) -> Path:
    """Download what the hub has under this name, and return its folder."""
    try:
        files = ["config.json", "model.safetensors", "README.md", *(f"{SOURCE}/{pattern}" for pattern in SMALL)]
        return Path(snapshot_download(str(name), allow_patterns=files, **words))
    except Exception as error:  # the hub's library and those below it raise many kinds
        why = one_line(error)
        raise UserError(f"{name}: no such folder, and the hub does not give a model of that name ({why})") from None


def _expanded(name: File) -> str:
    """Expand a folder's path, or return a hub id; UserError for what is neither."""
    text = os.fspath(name) if isinstance(name, File) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise UserError(f"a folder or a hub id is a text or a path, not {name!r}")
    return expand_path(text)


def _texts(texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(_several(texts))
    if isinstance(texts, Mapping | Set) or not all(isinstance(text, str) for text in listed):
        raise UserError("texts are strings, one or a list of them")
    return listed


def _several(items: Any) -> Iterable:
    """Return what can be gone through; UserError for what cannot."""
    try:
        iter(items)
    except TypeError:
        raise UserError(f"several things in a list are wanted, not {type(items).__name__}") from None
    return items


def _listed(items: Any) -> list:
    return items if isinstance(items, list) else [items]


def _name(clip: Clip) -> str:
    """Name a clip, for sampling its caption."""
    return "" if isinstance(clip, ClipInput) else str(clip)


def _clip(clip: Clip, model: Model) -> ClipInput:
    """Read those media of a clip that the model uses (cfg.modalities)."""
    kinds = model.cfg.modalities
    if isinstance(clip, ClipInput):
        return _whole(clip, model)
    if isinstance(clip, File):
        return _read(clip, model, kinds)
    if not isinstance(clip, tuple) or len(clip) != 2 or not all(isinstance(part, File | None) for part in clip):
        raise UserError(f"media are files, or pairs of files (pictures, sound), not {type(clip).__name__}")
    both = zip(clip, "va", strict=True)
    visual, audio = (_read(path, model, kind) if path and kind in kinds else ClipInput() for path, kind in both)
    return ClipInput(visual.frames, audio.segments, audio.rows)


def _whole(clip: ClipInput, model: Model) -> ClipInput:
    """Return the clip; UserError unless it is one, of the model's sizes."""
    if not isinstance(clip, ClipInput):
        raise UserError(f"a clip is a ClipInput, not {type(clip).__name__}")
    spec = model.spectrogram
    channels = 1 if spec.channels == "mono" else 3
    sizes = {"frames": (3, *model.pictures.size), "segments": (channels, spec.segment_rows, spec.n_mels)}
    for name, wanted in sizes.items():
        part = getattr(clip, name)
        if part is not None and not (
            isinstance(part, Tensor) and part.dtype == torch.uint8 and part.shape[1:] == wanted
        ):
            raise UserError(f"a ClipInput's {name} are a uint8 tensor (n, {', '.join(map(str, wanted))})")
    if not isinstance(clip.rows, int):
        raise UserError(f"a ClipInput's rows are a whole number, not {clip.rows!r}")
    return clip


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
        return preprocessing.read(path, model.spectrogram, model.frames, kinds, fit=model.pictures)


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
    if isinstance(rate, Tensor) and rate.numel() == 1:
        rate = rate.item()
    with _naming(sound if isinstance(sound, File) else "a waveform"):
        if isinstance(sound, Wave):
            yield from preprocessing.windows_of(sound, rate, spec, whole)
        elif not isinstance(sound, File):
            raise ValueError(f"neither a file nor samples, but {type(sound).__name__}")
        elif whole:
            yield from (window for *_, window in preprocessing.windows(sound, spec))
        else:
            yield preprocessing.read(sound, spec, FramesConfig(), "a")


def _video_input(video: Pictures, model: Model) -> ClipInput:
    with _naming(video if isinstance(video, File) else "a picture"):
        if isinstance(video, Image.Image) and 0 in video.size:
            raise ValueError("a picture without pixels")
        if isinstance(video, Image.Image):
            return preprocessing.of_image(video, model.pictures)
        if isinstance(video, File):
            return _read(video, model, "v")
        if not isinstance(video, Wave):
            raise ValueError(f"neither a file, a picture nor frames, but {type(video).__name__}")
        if isinstance(video, Tensor):
            video = (video.detach() if video.dtype == torch.uint8 else video.detach().float()).cpu().numpy()
        pixels = preprocessing.sample_uniformly(np.atleast_1d(video), model.frames.max_frames)
        return preprocessing.of_frames(pixels, model.pictures)
