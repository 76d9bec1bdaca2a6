"""The model of a run, and where its weights come from."""

from pathlib import Path
from typing import Any

from clip4vla.checkpoints import newest_checkpoint
from clip4vla.config import RunConfig, SpectrogramConfig, UserError, to_dict
from clip4vla.loader import check_fingerprint
from clip4vla.model import CLIP4VLA
from clip4vla.towers import describe_clip


def build_model(cfg: RunConfig, fingerprint: dict[str, Any], resume: Path | None) -> tuple[CLIP4VLA, str]:
    """(model, where its weights come from), the first of:

    1. the newest complete checkpoint of this run; 2. init_from; 3. the CLIP weights that model.clip names; 4. scratch.
    """
    if (cfg.model.fusion, cfg.model.modalities) != ("global_global", "av"):
        raise UserError(
            f"model.fusion={cfg.model.fusion}, model.modalities={cfg.model.modalities}: heads and single modalities belong "
            "to fine-tuning, which is not written yet; take global_global and av"
        )
    spectrogram = SpectrogramConfig(**fingerprint["spectrogram"])
    if resume:
        model = CLIP4VLA.from_checkpoint(resume)
        _must_match(model, cfg, spectrogram, resume)
        cfg.model.train_towers = model.cfg.train_towers  # the optimizer's state is of these
        model.cfg = cfg.model
        model.freeze()
        return model.train(), str(resume)
    model = CLIP4VLA(describe_clip(cfg.model.clip, cfg.model.quick_gelu), cfg.model, spectrogram)
    size = (spectrogram.segment_rows, spectrogram.n_mels)
    if model.vision.image_size != size:
        raise UserError(
            f"model.clip: its pictures are {model.vision.image_size}, segments {size}: take a CLIP of that size"
        )
    source = next((place for place in cfg.init_from if _checkpoint_in(place)), None)
    if cfg.init_from and not source and "scratch" not in cfg.init_from:
        raise UserError(
            f"init_from: no checkpoint in {', '.join(cfg.init_from)}; add `scratch` to the list to start without"
        )
    if source:
        source = str(_load_initial(model, source, cfg, spectrogram))
    elif model.load_clip():
        model.start_audio()
        source = cfg.model.clip
    else:  # nothing to freeze: towers without weights are trained
        model.start_audio()
        wanted = {*cfg.model.train_towers.split("+"), *(["text"] if cfg.loss.at or cfg.loss.tv else [])}
        wanted |= {"vision"} if cfg.loss.av or cfg.loss.tv else set()
        model.cfg.train_towers = "+".join(sorted(wanted))
        source = "scratch"
    model.freeze()
    return model.train(), source


def _checkpoint_in(place: str) -> Path | None:
    """The newest checkpoint of a run folder, or the folder itself if it is one."""
    return newest_checkpoint(place) or (Path(place) if Path(place, "model.safetensors").is_file() else None)


def _load_initial(model: CLIP4VLA, source: str, cfg: RunConfig, spectrogram: SpectrogramConfig) -> Path:
    """Weights of another run or checkpoint; its audio tower only if it was trained there."""
    folder = _checkpoint_in(source)
    other = CLIP4VLA.from_checkpoint(folder)
    heard = "audio" in other.cfg.train_towers
    _must_match(other, cfg, spectrogram if heard else None, folder)
    for name in ("text", "vision", *(["audio"] if heard else [])):
        getattr(model, name).load_state_dict(getattr(other, name).state_dict())
    if cfg.model.learn_temperature:
        model.log_scale.data.copy_(other.log_scale.data)
    if not heard:
        model.start_audio()
    return folder


def _must_match(model: CLIP4VLA, cfg: RunConfig, spectrogram: SpectrogramConfig | None, folder: Path) -> None:
    """UserError if a checkpoint's towers or spectrograms are not those of this run."""
    ours = describe_clip(cfg.model.clip, cfg.model.quick_gelu)
    if model.clip_config != ours:
        key = next(k for k in {**ours, **model.clip_config} if ours.get(k) != model.clip_config.get(k))
        raise UserError(
            f"{folder}: a checkpoint of another model: {key} is {model.clip_config.get(key)} there and {ours.get(key)} "
            f"in model.clip={cfg.model.clip}; change model.clip, or run_dir / init_from"
        )
    if spectrogram:
        theirs = {"spectrogram": to_dict(model.spectrogram)}
        check_fingerprint(theirs, {"spectrogram": to_dict(spectrogram)}, str(folder), "the shards of data.train")
