"""Set up a run: open its data, build its model with the right weights, merge DeepSpeed's settings."""

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clip4vla.checkpoints.lookup import chosen_checkpoint, newest_checkpoint
from clip4vla.checkpoints.manager import checkpoint_to_resume
from clip4vla.config import FramesConfig, ModelConfig, RunConfig, SpectrogramConfig
from clip4vla.config_io import to_dict
from clip4vla.data.loader import Loader, check_fingerprint, open_folders
from clip4vla.data.precomputed_embeddings import open_vectors, space_of
from clip4vla.data.sample_metadata import labels_of, parse
from clip4vla.data.sampler import TrainSampler
from clip4vla.data.shards import CorruptSample, ShardFolder
from clip4vla.distributed import collectives
from clip4vla.distributed.rank_0 import ProgressCallback, run_on_rank_0
from clip4vla.errors import UserError
from clip4vla.evaluation import manifest
from clip4vla.evaluation.runner import check_evaluation
from clip4vla.losses.objective import TERMS
from clip4vla.media.images import Fit
from clip4vla.models.classifier import label_of
from clip4vla.models.fusion import must_have_room
from clip4vla.models.model import Model, needed_towers, uses_head
from clip4vla.models.towers_fingerprint import towers_sha256
from clip4vla.towers.build import Undrawn
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.space import is_space
from clip4vla.towers.tokenizer import tokenizer
from clip4vla.towers.weights import names_weights
from clip4vla.training import engine
from clip4vla.training.flops import towers_run

TOWERS = ("text", "vision", "audio")
MAKES_AUDIO = (
    "audio_tower",
    "audio_patch",
    "audio_span",
    "audio_pool",
)  # settings that the audio tower is trained with


class RunSetup(NamedTuple):
    """Holds what training needs, checked; nothing is written yet."""

    device: torch.device
    folders: list[ShardFolder]
    ds: dict[str, Any]  # DeepSpeed's settings, merged with the YAML's
    resume: Path | None  # the checkpoint to go on from
    model: Model
    origin: str  # of its weights
    vectors: list[ShardFolder] | None

    @property
    def stage(self) -> int:
        """Return the stage of ZeRO."""
        return self.ds.get("zero_optimization", {}).get("stage", 0)

    @property
    def precision(self) -> str:
        """Name the precision: fp32, bf16 or fp16."""
        return next((kind for kind in ("bf16", "fp16") if self.ds[kind]["enabled"]), "fp32")

    @property
    def width(self) -> int:
        """Return the bytes of a weight and of a gradient."""
        return 4 if self.precision == "fp32" else 2

    @property
    def sent_width(self) -> int:
        """Return the bytes of a gradient while the ranks add it up."""
        return 4 if self.ds.get("communication_data_type") == "fp32" else self.width


def prepare(cfg: RunConfig, ds_config: str | None) -> RunSetup:
    """Join the other ranks, open the data, build the model; UserError for whatever would stop the run later."""
    device = collectives.setup(cfg.train.hang_timeout_minutes)
    torch.manual_seed(cfg.seed)
    folders = open_folders(cfg.data.train, "data.train", cfg.data)
    ds = engine.merge_ds_config(*engine.read_ds_config(ds_config), cfg)
    check_evaluation(cfg)
    _check_losses(cfg)
    resume = checkpoint_to_resume(cfg)
    if cfg.model.head == "classifier" and not cfg.model.labels:
        cfg.model.labels = all_labels(folders, cfg.model.several_labels)
    model, origin = build_model(cfg, fingerprint_of(cfg, folders[0]), resume)
    towers_hash = functools.partial(towers_sha256, model)  # before the engine rounds the weights
    vectors = open_vectors(folders, cfg, model.cfg.trainable_towers, towers_hash)
    return RunSetup(device, folders, ds, resume, model, origin, vectors)


def _check_losses(cfg: RunConfig) -> None:
    """Raise UserError for losses that no step could compute."""
    if not cfg.train.max_steps:
        raise UserError("train.max_steps=0: nothing to train; launch/evaluate.py evaluates such a config")
    if not any(getattr(cfg.loss, name) for name in TERMS):
        raise UserError(f"loss: every weight is 0: give {', '.join(TERMS)} one")
    idle = set(cfg.model.trainable_towers.split("+")) & set(TOWERS) - set(needed_towers(cfg.loss, cfg.model.modalities))
    if idle:
        raise UserError(
            f"model.trainable_towers: no loss runs the {idle.pop()} tower: leave it out, or give its loss a weight"
        )
    head = cfg.model.head
    trained_by = {"captioner": "caption", "classifier": "label"}.get(head, "tm")
    given = {name for name in ("tm", "caption", "label") if getattr(cfg.loss, name)}
    if given - {trained_by} or (head != "global_global" and not given):
        weights = ", ".join(f"loss.{name}={getattr(cfg.loss, name):g}" for name in ("tm", "caption", "label"))
        raise UserError(
            f"model.head={head}, {weights}: captioner is trained by loss.caption, classifier by loss.label, the heads of "
            "retrieval by loss.tm, and by no other of these"
        )
    if (cfg.model.head, cfg.train.negatives) == ("local_local", "global") and cfg.train.gradient_accumulation_steps > 1:
        raise UserError(
            f"train.gradient_accumulation_steps={cfg.train.gradient_accumulation_steps}: "
            "local_local compares the clips of a micro-batch alone: set train.negatives=micro, "
            "or train.gradient_accumulation_steps=1"
        )
    terms = [name for name in TERMS if getattr(cfg.loss, name)]
    if cfg.augment.mix and (terms, cfg.model.modalities) != (["label"], "a"):
        raise UserError(
            f"augment.mix={cfg.augment.mix:g}: two sounds in one have two labels, but no caption and no picture: it needs "
            "loss.label alone, and model.modalities=a"
        )
    if cfg.loss.label_smoothing > 1:
        raise UserError(f"loss.label_smoothing={cfg.loss.label_smoothing:g}: it is a share, at most 1")
    if cfg.train.compile != "off" and uses_head(cfg.loss):
        raise UserError("train.compile: a head's inputs have other shapes in every batch: set train.compile=off")
    if cfg.train.compile != "off" and cfg.model.audio_span == "clip":
        raise UserError(
            "train.compile: with model.audio_span=clip sequences have other lengths in every batch: set train.compile=off"
        )


def all_labels(folders: list[ShardFolder], several: bool) -> list[str]:
    """List the labels of all clips of the folders, sorted, on all ranks.

    Raises UserError without any, or if a clip has several of them and `several` is not set.
    """

    def read(passed: ProgressCallback) -> list[str]:
        labels: set[str] = set()
        for folder in folders:
            for shard, held in enumerate(folder.shards):
                passed(f"start-up: labels in {held.name}")
                samples = folder.read([(shard, entry) for entry in range(held.samples)], ("json",))
                labels.update(label for sample in samples for label in _labels(sample, several))
        return sorted(labels - {""})

    labels, failed = run_on_rank_0(read)
    if failed or not labels:
        where = ", ".join(folder.url for folder in folders)
        raise UserError(failed or f"{where}: no clip has a label; name what their classes are in model.labels")
    return labels


def _labels(sample: dict[str, bytes] | CorruptSample, several: bool) -> list[str]:
    """List the labels of a sample; none of a corrupt one, which the loader will count."""
    try:
        clip = parse(b"" if isinstance(sample, CorruptSample) else sample.get("json", b""))
    except ValueError:
        return []
    return labels_of(clip) if several else [label_of(clip)]


def train_loader(
    cfg: RunConfig, folders: list, vectors: list | None, device: torch.device, fit: Fit | None = None
) -> Loader:
    """Make the loader of endless training batches; it reads no spectrograms without a loss for them, nor frames with vectors.

    fit: Model.pictures, to which frames are resized.
    """
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    order = TrainSampler(sizes, list(cfg.data.train.values()), cfg.train.batch_size, cfg.seed, cfg.data.shuffle_window)
    run = towers_run(cfg, bool(vectors))
    needs = [kind for tower, kind in (("audio", "fbank"), ("vision", "frames")) if tower in run]
    tokenize = tokenizer(cfg.model.clip, cfg.model.max_tokens, fixed=cfg.train.compile != "off")
    return Loader(
        folders, order, cfg.data, tokenize=tokenize, mask=cfg.mask, seed=cfg.seed,
        needs=needs, vectors=vectors, device=device, pieces=cfg.train.gradient_accumulation_steps, augment=cfg.augment, fit=fit,
        pad_tokens=(cfg.train.compile != "off") * cfg.model.max_tokens,  # 0: no padding
        damage_log=Path(cfg.run_dir, f"corrupt-{collectives.rank()}.jsonl"),
    )  # fmt: skip


def fingerprint_of(cfg: RunConfig, folder: ShardFolder) -> dict[str, Any]:
    """Return the fingerprint of a folder's shards; with model.clip=vectors:NAME also the `space` of their vectors."""
    return folder.fingerprint | ({"space": space_of(folder, cfg.model.clip)} if is_space(cfg.model.clip) else {})


def build_model(cfg: RunConfig, fingerprint: dict[str, Any], resume: Path | None) -> tuple[Model, str]:
    """Build (model, where its weights come from), with weights from the first of:

    1. the newest complete checkpoint of this run, here or at train.mirror; 2. init_from;
    3. the CLIP weights that model.clip names; 4. scratch. fingerprint: see fingerprint_of.
    """
    must_have_room(cfg.model, fingerprint)
    spectrogram = SpectrogramConfig(**fingerprint["spectrogram"])
    clip = fingerprint.get("space") or resolve_clip_config(cfg.model.clip, cfg.model.quick_gelu)
    if resume:
        model = Model.from_checkpoint(resume)
        _must_match(model, cfg, clip, spectrogram, resume)
        _same_head(model, cfg, resume)
        for name in ("trainable_towers", "freeze_layers"):  # the optimizer's state is of these
            setattr(cfg.model, name, getattr(model.cfg, name))
        model.cfg = cfg.model
        model.must_have_positions()
        model.freeze()
        return model.train(), str(resume)
    frames = FramesConfig(**fingerprint["frames"])
    loaded = names_weights(cfg.model.clip) and cfg.model.audio_init == "vision"
    with Undrawn() if loaded else contextlib.nullcontext():
        model = Model(clip, cfg.model, spectrogram, frames)
    model.must_have_positions()
    source = next((place for place in cfg.init_from if _checkpoint_in(place)), None)
    if cfg.init_from and not source and "scratch" not in cfg.init_from:
        raise UserError(
            f"init_from: no checkpoint in {', '.join(cfg.init_from)}; add `scratch` to the list to start without"
        )
    if source:
        source = str(_load_initial(model, source, cfg, clip, spectrogram))
    elif "space" in clip:
        model.start_audio()
        source = f"{cfg.model.audio_tower} for audio"
    elif model.load_clip():
        model.start_audio()
        model.init_head()
        source = cfg.model.clip
    else:  # nothing to freeze: towers without weights are trained
        model.start_audio()
        wanted = {*cfg.model.trainable_towers.split("+"), *needed_towers(cfg.loss, cfg.model.modalities)}
        model.cfg.trainable_towers = "+".join(sorted(wanted))
        source = "scratch"
    edges = ((name, value.aminmax()) for name, value in model.state_dict().items())  # isfinite() takes 20 times as long
    broken = next((name for name, (low, high) in edges if not (low.isfinite() and high.isfinite())), "")
    if broken:
        raise UserError(f"{source}: the weights of {broken} are not finite: take another checkpoint, or other weights")
    model.freeze()
    return model.train(), source


def load_eval_model(cfg: RunConfig) -> tuple[Model, dict[str, Any]]:
    """Load (model, for the manifest where its weights come from) of a run to evaluate.

    It is the run's best checkpoint by eval.best_metric, else its newest one; with train.max_steps=0 what training would
    start from. Raises UserError if there is none.
    """
    if not cfg.train.max_steps:
        if cfg.model.head == "classifier":
            raise UserError(
                "train.max_steps=0, model.head=classifier: a fresh classifier knows nothing: train it first"
            )
        torch.manual_seed(cfg.seed)  # what is fresh is the same each time
        fingerprint = fingerprint_of(cfg, open_folders(cfg.data.test, "data.test", cfg.data)[0])
        model, origin = build_model(cfg, fingerprint, None)
        there = Path(origin, "model.safetensors").is_file()
        return model.eval(), manifest.of_checkpoint(Path(origin)) if there else {"folder": origin, "step": 0}
    checkpoint = chosen_checkpoint(cfg)
    if checkpoint is None:
        raise UserError(
            f"run_dir {cfg.run_dir}: no checkpoint there; train first, name the run with run_dir=FOLDER, or set "
            "train.max_steps=0 to evaluate the weights that init_from and model.clip give"
        )
    model = Model.from_checkpoint(checkpoint)
    cfg.model.labels = cfg.model.labels or model.cfg.labels
    _must_equal(model, cfg, MAKES_AUDIO, checkpoint)
    _same_head(model, cfg, checkpoint)
    model.cfg = cfg.model
    model.must_have_positions()
    return model, manifest.of_checkpoint(checkpoint)


def _checkpoint_in(place: str) -> Path | None:
    """Find the newest checkpoint of a run folder, or return the folder itself if it is one."""
    return newest_checkpoint(place) or (Path(place) if Path(place, "model.safetensors").is_file() else None)


def _load_initial(
    model: Model, source: str, cfg: RunConfig, clip: dict[str, Any], spectrogram: SpectrogramConfig
) -> Path:
    """Load the weights of another run or checkpoint, its audio tower only if it was trained there; returns their folder."""
    folder = _checkpoint_in(source)
    assert folder
    other = Model.from_checkpoint(folder)
    audio_trained = "audio" in other.cfg.trainable_towers
    _must_match(other, cfg, clip, spectrogram if audio_trained else None, folder)
    for name in ("text", "vision", *(["audio"] if audio_trained else [])):
        getattr(model, name).load_state_dict(getattr(other, name).state_dict())
    if cfg.model.learn_temperature:
        model.logit_scale.data.copy_(other.logit_scale.data)
    if not audio_trained:
        model.start_audio()
    same = all(getattr(other.cfg, name) == getattr(cfg.model, name) for name in _shapes_head(cfg.model))
    if same and other.spectrogram.max_segments == model.spectrogram.max_segments:
        model.head.load_state_dict(other.head.state_dict())
    else:
        model.init_head()
    return folder


def _shapes_head(cfg: ModelConfig) -> list[str]:
    """List the settings that the head's weights depend on."""
    if cfg.head == "classifier":
        return ["head", "modalities", "labels", "several_labels"]
    names = ["head", *(["head_layers", "max_frames"] if cfg.head != "global_global" else [])]
    if cfg.head == "captioner":
        return [*names, "max_tokens"]
    return names + {"all": ["text_tokens", "max_tokens"], "eos": ["text_tokens"]}[cfg.text_tokens] * (
        cfg.head == "local_local"
    )


def _same_head(model: Model, cfg: RunConfig, folder: Path) -> None:
    """Raise UserError if the checkpoint's head is not this run's."""
    _must_equal(model, cfg, _shapes_head(cfg.model), folder)


def _must_equal(model: Model, cfg: RunConfig, names: Iterable[str], folder: Path) -> None:
    """Raise UserError if a checkpoint has other settings of these names."""
    for name in names:
        theirs, ours = getattr(model.cfg, name), getattr(cfg.model, name)
        if theirs != ours:
            raise UserError(
                f"{folder}: model.{name} is {theirs} there and {ours} here; resume with the same, or start a new run_dir"
            )


def _must_match(
    model: Model, cfg: RunConfig, ours: dict[str, Any], spectrogram: SpectrogramConfig | None, folder: Path
) -> None:
    """Raise UserError if a checkpoint's towers or spectrograms are not those of this run, whose clip_config is `ours`."""
    if "preprocess_cfg" not in model.clip_config:  # of a version that did not keep it
        ours = {key: value for key, value in ours.items() if key != "preprocess_cfg"}
    if model.clip_config != ours:
        key = next(k for k in {**ours, **model.clip_config} if ours.get(k) != model.clip_config.get(k))
        raise UserError(
            f"{folder}: a checkpoint of another model: {key} is {model.clip_config.get(key)} there and {ours.get(key)} "
            f"in model.clip={cfg.model.clip}; change model.clip, or run_dir / init_from"
        )
    if spectrogram:
        theirs = {"spectrogram": to_dict(model.spectrogram)}
        check_fingerprint(theirs, {"spectrogram": to_dict(spectrogram)}, str(folder), "the shards of data.train")
        _must_equal(model, cfg, MAKES_AUDIO, folder)
