"""What users write themselves, or got from somebody: YAML configs and KEY=VALUE words, ds.json, labels and templates."""

import json
from pathlib import Path
from typing import Any

import yaml

from clip4vla.config import DataConfig, ImportConfig, RunConfig
from clip4vla.config_io import describe, load, to_dict
from clip4vla.evaluation import classification
from clip4vla.training import engine
from faults._trees import DEEP, DEEPER, DIGITS, LONG, Damage
from faults._watch import Target

ROOT = Path(__file__).parents[2]
DS = sorted((ROOT / "configs/deepspeed").glob("*.json"))
MARKS = {DEEP: "[" * 100_000, DEEPER: "{a: " * 950, DIGITS: "9" * 5000, LONG: "x" * 1_000_000}


def configs(root: Path) -> tuple[Path, list[tuple[type, bytes, Any]]]:
    """Where a config goes, and the shipped ones."""
    folders = {"pretrain": RunConfig, "finetune": RunConfig, "data": DataConfig}
    found = [(cls, path) for name, cls in folders.items() for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]
    some = [(cls, path.read_bytes(), yaml.safe_load(path.read_text())) for cls, path in found]
    root.mkdir(exist_ok=True)
    return root / "config.yaml", [
        *some,
        (ImportConfig, b"preset: official\n", {"preset": "official", "model": {"clip": "x"}}),
    ]


def config(state: tuple[Path, list[tuple[type, bytes, Any]]], damage: Damage) -> str:
    """Settings of a corrupt file and hostile words: each of its type, and the same when they were written and read again."""
    path, some = state
    cls, data, tree = damage.rng.choice(some)
    path.write_bytes(damage.yaml(data, tree) if damage.rng.random() < 0.7 else data)
    cfg: Any = load(cls, path, [word(cls, damage) for _ in range(damage.rng.randrange(3))])
    for value in _leaves(to_dict(cfg)):
        assert isinstance(value, str | int | float | bool) and value == value, value
    path.write_text(yaml.safe_dump(to_dict(cfg)), encoding="utf-8")
    assert to_dict(load(cls, path)) == to_dict(cfg)
    return "settings"


def word(cls: type, damage: Damage) -> str:
    """KEY=VALUE with a hostile key or value."""
    key = damage.rng.choice(describe(cls))[0] if damage.rng.random() < 0.9 else damage.word()
    value = damage.value()
    value = MARKS.get(value, value) if isinstance(value, str) else json.dumps(value)
    return f"{key}={value}".replace("\0", "") if damage.rng.random() < 0.95 else damage.word()


def _leaves(tree: Any) -> list[Any]:
    some = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return [tree] if some is None else [leaf for item in some for leaf in _leaves(item)]


def ds(state: tuple[Path, list[tuple[type, bytes, Any]]], damage: Damage) -> str:
    """DeepSpeed's settings of a corrupt file with the YAML's: what the YAML decides is as it says."""
    path = state[0].with_name("ds.json")
    data = damage.rng.choice(DS).read_bytes()
    tree = json.loads(data)
    tree |= {
        key: "auto" for key in ("train_batch_size", "gradient_clipping", "bf16", "fp16") if damage.rng.random() < 0.2
    }
    path.write_bytes(damage.json(json.dumps(tree).encode()))
    cfg = RunConfig()
    cfg.train.compile = damage.rng.choice(("off", "inductor"))
    found = engine.merge_ds_config(*engine.read_ds_config(str(path)), cfg)
    assert found["train_batch_size"] == cfg.train.batch_size and found["optimizer"]["params"]["lr"] == cfg.train.lr
    json.dumps(found, indent=1).encode()
    return "settings"


def labels(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    return root / "labels.txt"


def label(path: Path, damage: Damage) -> str:
    """Classes of a corrupt file, and templates: at least two, all different, put into templates as text and nothing else."""
    cfg = RunConfig()
    path.write_bytes(damage.lines(b"a dog\nrain\nclock alarm\ncrying baby\n"))
    cfg.classify.labels = (
        [str(path)] if damage.rng.random() < 0.7 else [damage.word() for _ in range(damage.rng.randrange(4))]
    )
    cfg.classify.templates = ["a photo of {}", damage.word() + damage.rng.choice(("", "{}"))]
    cfg.data.train, cfg.data.test = {"a": 1.0}, {"b": 1.0}
    cfg.classify.method = "zero_shot"
    classification.check(cfg)
    found = classification.class_names(cfg)
    assert len(set(found)) == len(found) != 1 and all("{}" in template for template in cfg.classify.templates)
    return "classes"


TARGETS = [
    Target("configs and words", configs, config),
    Target("ds.json", configs, ds),
    Target("labels and templates", labels, label),
]
