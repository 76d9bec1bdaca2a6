"""Write README.md of a model folder: metadata as the Hugging Face Hub reads it, and what a reader must know.

Names of folders, labels and languages are other people's: Markdown takes them as text, and URLs lose what may be secret.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from clip4vla.checkpoints.best import HIGHER, LOWER
from clip4vla.config import ImportConfig, RunConfig
from clip4vla.config_io import flatten, load, parse_json, parse_yaml, to_dict
from clip4vla.errors import UserError, one_line
from clip4vla.models.model import Model

TASKS = {
    "captioner": "video-text-to-text",
    "classifier": "video-classification",
}  # the Hub's names; else feature-extraction
LOADING = """from clip4vla import CLIP4VLA

model = CLIP4VLA.from_pretrained("path/to/this/folder")
"""
CALLS = {
    "captioner": 'model.caption("clip.mp4")',
    "classifier": 'model.classify("clip.mp4")          # probabilities of model.cfg.labels',
}
OTHER = 'model.similarity(["a dog barks"], ["clip.mp4", "sound.wav"])'
SOUNDS = (
    'model.encode_audio(["clip.mp4", "sound.wav"])  # texts and pictures: vectors of the model that the space is of'
)
# of no use to a reader, or in sections of their own; evaluations have their command
OMITTED = (
    "run_dir",
    "track",
    "eval",
    "decode",
    "classify",
    "data.train",
    "data.val",
    "data.test",
    "data.cache",
    "train.mirror",
)
EVALUATED = ("data", "model", "eval", "decode", "classify")  # sections that an evaluation may be given on top
LONGEST = 300  # characters of a name or value


def card(model: Model, run: str | Path | None = None, step: int | None = None, origin: str = "") -> ModelCard:
    """Make the card of a model. run: a run folder, to add how it was trained and evaluated; step: of the weights.

    origin: a sentence.
    Raises UserError for a file of the run that cannot be read.
    """
    head, run = model.cfg.head, Path(run) if run else None
    tree = _read(run / "config.yaml", parse_yaml) if run else {}
    data = ModelCardData(
        library_name="clip4vla",
        pipeline_tag=TASKS.get(head, "feature-extraction"),
        tags=["clip", "clip4vla", "audio", "video", "text", head.replace("_", "-")],
    )
    parts = [f"# {escaped(run.resolve().name if run else 'CLIP4VLA')}", _model(model), escaped(origin)]
    parts += [
        "## How to load it",
        f"```python\n{LOADING}{SOUNDS if 'space' in model.clip_config else CALLS.get(head, OTHER)}\n```",
    ]
    with _readable(f"{run}/config.yaml"):
        settings = _settings(model, tree)
        trained = {section: {**tree.get(section, {})} for section in EVALUATED}
        shards = _data(trained["data"])
    if run:
        parts += ["## Data", shards, "## Training", _training(run, step)]
        parts += ["## Evaluation", *_evaluations(run, trained, step)]
    parts += ["## Settings that differ from the defaults", settings, "## Limits", _limits(model)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def escaped(text: object) -> str:
    """Return a line of Markdown that shows a text as it is, at most LONGEST characters, without what URLs hide."""
    line = _one_line(text)
    line = line if len(line) <= LONGEST else line[:LONGEST] + "..."
    return re.sub(r"(?i)(?<=www)\.", r"\\.", re.sub(r"([\\`*_{}\[\]<>#|~&!$@:])", r"\\\1", line))


def _one_line(text: object) -> str:
    """Return a text without line ends, control characters, and the passwords and queries of URLs."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", re.sub(r"(\w://)[^\s/@]*@", r"\1", line))


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table of texts that are not escaped yet."""
    lines = [list(head), *([escaped(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _architectures(clip: dict[str, Any]) -> list[tuple[str, str]]:
    """Name the towers that open_clip has of other libraries."""
    parts = (("vision", "timm", "timm_model_name"), ("text", "transformers", "hf_model_name"))
    names = [(part, library, clip.get(f"{part}_cfg", {}).get(key)) for part, library, key in parts]
    return [(f"{part} tower, of {library}", name) for part, library, name in names if name]


def _model(model: Model) -> str:
    sizes = {
        name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("text", "vision", "audio", "head")
    }
    rows = [(f"{name}, million parameters", f"{size / 1e6:.1f}") for name, size in sizes.items() if size]
    sound, seconds = model.spectrogram, model.spectrogram.segment_rows * model.spectrogram.hop_length
    rows += [
        ("width of the common space", model.clip_config["embed_dim"]),
        ("towers, as open_clip names them", model.cfg.clip),
        *_architectures(model.clip_config),
        *(("sha256 of the space", space["identity"]) for space in [model.clip_config.get("space")] if space),
        *(("audio tower", name) for name in [model.cfg.audio_tower] if name != "vision"),
        ("trained", model.cfg.trainable_towers),
        ("head", model.cfg.head),
        (
            "sound",
            f"{sound.sample_rate} Hz, segments of {seconds / sound.sample_rate:.3f} s, {sound.max_segments} at most",
        ),
        ("pictures", f"{model.frames.fps:g} a second, {model.frames.max_frames} at most"),
    ]
    about = "CLIP with an audio tower, made with clip4vla: text, pictures and sounds as vectors of one space."
    if "space" in model.clip_config:
        about = f"An audio tower for the space {escaped(model.cfg.clip)}, made with clip4vla: sounds as vectors of that space."
    return f"{about}\n\n{table(('model', ''), rows)}"


def _settings(model: Model, tree: dict[str, Any]) -> str:
    preset = f"preset={tree.get('preset', 'paper')}"
    default = flatten(to_dict(load(RunConfig, None, [preset])) | to_dict(load(ImportConfig, None, [preset])))
    here = flatten(tree | {key: value for key, value in model.config().items() if key != "clip"})
    shown = [key for key in here if not any(key == name or key.startswith(f"{name}.") for name in OMITTED)]
    rows = [(key, here[key], default.get(key, "")) for key in shown if here[key] != default.get(key)]
    return table(("setting", "here", "default"), rows) if rows else "None."


def _data(data: dict[str, Any]) -> str:
    shares = data.get("train", {})
    whole = sum(shares.values()) or 1
    return table(
        ("shards", "share of a batch", "clips"),
        [(folder, f"{share / whole:.1%}", _clips(folder)) for folder, share in shares.items()],
    )


def _clips(folder: str) -> str:
    """Count the clips of a shard folder, - if it is not on this machine any more."""
    index = Path(folder, "index.json")
    if not index.is_file():
        return "-"
    with _readable(index):
        return f"{_read(index, parse_json)['counts']['samples']:,}"


def _training(run: Path, step: int | None) -> str:
    from clip4vla.paper import cost  # with packages that only training needs
    from clip4vla.report.tracking import read_rows

    rows = read_rows(run, until=float("inf") if step is None else step)
    if not rows:
        return "No log of it was kept."
    last = rows[-1]
    with _readable(run / "metrics.jsonl"):
        facts = [
            ("steps", f"{last['step']:,}"),
            ("clips seen", f"{last['samples']:,}"),
            ("loss at the end", f"{last['loss']:.4g}"),
        ]
    try:
        hours = cost.of_log(str(run), rows)["hours"]
        devices = [f"{last[kind]} {cost.DEVICES[kind]}s" for kind in hours if kind in last]
        facts += [("time", " and ".join(f"{value:.3g} {cost.DEVICES[kind]} h" for kind, value in hours.items()))]
        facts += [("devices", ", ".join(devices)), ("ranks", last.get("ranks", ""))] if devices else []
    except UserError:
        pass  # an older version's log, which does not say on what it ran
    lines = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    versions = [line.strip("# ") for line in lines if line.startswith("# ")]
    return table(("training", ""), [*facts, *([("versions", ", ".join(versions))] if versions else [])])


def _evaluations(run: Path, trained: dict[str, dict[str, Any]], step: int | None) -> Iterator[str]:
    """Yield the evaluations of these weights; validation has its step in the folder's name, others have a manifest.

    trained: the sections EVALUATED of the run's settings.
    """
    none = "Not evaluated."
    for file in sorted(run.glob("eval/*/metrics.json")):
        name, manifest = file.parent.name, file.with_name("manifest.json")
        made = _read(manifest, parse_json) if manifest.is_file() else {}
        with _readable(manifest):
            at = int(name[4:]) if re.fullmatch(r"val-\d+", name) else made.get("checkpoint", {}).get("step")
            command = _command(run, trained, made.get("settings", {}))
        if step is not None and at is not None and at != step:
            continue
        none = ""
        yield f"{escaped(name)}" + ("" if at is not None else " (of which step was not noted)") + ":"
        with _readable(file):
            numbers = _metrics(_read(file, parse_json))
        yield numbers
        if not name.startswith("val-"):
            yield f"```bash\n{command}\n```"
    yield none


def _metrics(metrics: dict[str, dict[str, Any]]) -> str:
    """Return a table of each direction's metrics, with their 95% intervals."""
    order = [*HIGHER, *LOWER, "p_value", "n_queries", "n_gallery", "n_clips", "n_references", "n_classes"]
    names = [name for name in order if any(name in row for row in metrics.values())]

    def cell(row: dict[str, Any], name: str) -> str:
        value, low_high = row.get(name), row.get("ci", {}).get(name)
        shown = "" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"
        return shown + (f" ({low_high[0]:.3g} to {low_high[1]:.3g})" if low_high else "")

    return table(
        ["", *names], ([direction, *(cell(row, name) for name in names)] for direction, row in metrics.items())
    )


def _command(run: Path, trained: dict[str, dict[str, Any]], used: dict[str, Any]) -> str:
    """Return the command that evaluates it again: the run's settings, and those that were given on top."""
    words = [
        f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
        for section in EVALUATED
        for key, value in used.get(section, {}).items()
        if key != "labels" and trained[section].get(key, value) != value
    ]
    return _one_line(shlex.join(["python", "launch/evaluate.py", str(run / "config.yaml"), *words]))


def _limits(model: Model) -> str:
    sound, top = model.spectrogram, min(model.spectrogram.f_max, model.spectrogram.sample_rate / 2)
    most = sound.segment_rows * sound.hop_length * sound.max_segments / sound.sample_rate
    lines = [
        f"Sound above {top / 1000:g} kHz is not used; a clip gives at most {most:.1f} s of it, a longer one its centre.",
        f"Of a text {model.cfg.max_tokens} tokens are read, its beginning and end marks included.",
        "Scores rank candidates against each other; they are no probabilities that a description is true.",
        "It knows the languages, sounds and pictures of its data, with their biases, and was not examined for these.",
    ]
    return "\n".join(f"- {line}" for line in lines)


@contextmanager
def _readable(file: str | Path) -> Iterator[None]:
    """Raise UserError for what only a corrupt file raises inside."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not readable ({one_line(error)}); correct it or remove it") from None


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    with _readable(file):
        tree = parse(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise TypeError(f"expected names with values, found {type(tree).__name__}")
    return tree
