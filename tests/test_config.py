"""config.py: precedence, strictness, presets, help; and every YAML that ships."""

from pathlib import Path

import pytest
import yaml
from forks import ROOT
from running import run

from clip4vla.cli import help_text
from clip4vla.config import OFFICIAL, DataConfig, RunConfig
from clip4vla.config_io import describe, load, to_dict
from clip4vla.errors import UserError

YAMLS = sorted((ROOT / "configs").rglob("*/*.yaml"))


def kind(path: Path) -> type:
    return DataConfig if path.parent.name == "data" else RunConfig


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_every_shipped_yaml_loads_under_both_presets(path, preset):
    cfg = load(kind(path), path, [f"preset={preset}"])
    assert cfg.preset == preset
    assert path.read_text().startswith("#"), "its header says the command and what to expect"


def test_defaults_preset_file_command_line_in_this_order(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("preset: official\nmask: {fill: mean}\ntrain: {lr: 1e-3}\n")
    cfg = load(RunConfig, file, ["train.lr=2e-3", "mask.length=7"])
    assert cfg.mask.random_length is True  # preset
    assert cfg.mask.fill == "mean"  # file over preset
    assert cfg.train.lr == 2e-3 and cfg.mask.length == 7  # command line over file
    assert cfg.mask.time_start_prob == 0.15  # default


def test_each_official_difference_is_one_named_setting():
    known = {name: default for cls in (RunConfig, DataConfig) for name, default, _ in describe(cls)}
    assert set(OFFICIAL) <= set(known)
    for cls in (RunConfig, DataConfig):
        paper, official = (_flat(to_dict(load(cls, None, [f"preset={p}"]))) for p in ("paper", "official"))
        differ = {key for key in paper if paper[key] != official[key]} - {"preset"}
        assert differ == {key for key in OFFICIAL if key in paper}


@pytest.mark.parametrize(
    "text, words",
    [
        ("trian: {lr: 1}", "unknown key trian; the nearest is train"),
        ("train: {learning_rate: 1}", "unknown key train.learning_rate; the nearest is train."),
        ("train: {lr: fast}", "train.lr must be float, not 'fast'"),
        ("train: {max_steps: 1.5}", "train.max_steps must be int, not 1.5"),
        ("train: {max_steps: true}", "train.max_steps must be int, not True"),
        ("train: 3", "train holds settings"),
        ("model: {head: mean}", "model.head must be global_global|global_local|local_local"),
        ("- a\n- b", "expected `key: value`"),
        ("a: [", "not valid YAML"),
        ("train: {lr: 1}\ndata: {}\ntrain: {max_steps: 5}", "not valid YAML: the key train is given twice"),
        ("train:\n  lr: 1\n  seed: 1\n  lr: 2", "not valid YAML: the key lr is given twice, line 2 and after it"),
        ("data: {train: {x: many}}", "data.train.x must be float"),
        ("data: {train: [{x: 1}]}", "data.train must be"),
        ("train: {save_every: 0}", "train.save_every must be at least 1, not 0"),
        ("model: {temperature: 0}", "model.temperature must be at least 0.0001, not 0"),
        ("seed: -1", "seed must be at least 0, not -1"),
    ],
)
def test_a_wrong_file_gets_one_line_with_file_and_key(tmp_path, text, words):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(RunConfig, file)
    assert words in str(caught.value) and "wrong.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_yaml_merges_may_be_given_again(tmp_path):
    text = "data: {train: &a {x: 1, y: 2}, val: &b {<<: *a, x: 3}, test: {<<: *b, y: 4}}\n"
    (tmp_path / "a.yaml").write_text(text)
    data = load(RunConfig, tmp_path / "a.yaml").data
    assert data.val == {"x": 3, "y": 2} and data.test == {"x": 3, "y": 4}


def test_a_yaml_is_utf8_with_or_without_a_mark(tmp_path):
    text = "# é\nrun_dir: runs/é\n"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.yaml").write_text(text, encoding=encoding)
        assert load(RunConfig, tmp_path / "a.yaml").run_dir == "runs/é"
    for encoding, line in (("latin-1", 1), ("utf-16", 1)):
        (tmp_path / "a.yaml").write_text(text, encoding=encoding)
        with pytest.raises(
            UserError, match=rf"a.yaml: cannot read this config file \(line {line} is not UTF-8 text; convert"
        ):
            load(RunConfig, tmp_path / "a.yaml")


def test_forms_of_values(tmp_path):
    cfg = load(
        RunConfig,
        None,
        ["data.train=a", "data.val=[b, c]", "data.test={d: 0.25}", "eval.audio_types=0.3", "model.audio_type=0.5"],
    )
    assert cfg.data.train == {"a": 1.0} and cfg.data.val == {"b": 1.0, "c": 1.0} and cfg.data.test == {"d": 0.25}
    assert cfg.eval.audio_types == ["0.3"] and cfg.model.audio_type == "0.5"
    for word, mode in (("off", "off"), ("offline", "offline")):
        assert load(RunConfig, None, [f"track.wandb={word}"]).track.wandb == mode


def test_a_resolved_config_loads_again(tmp_path):
    cfg = load(RunConfig, None, ["preset=official", "train.lr=3e-4", "data.train={a: 0.5}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    assert load(RunConfig, tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize("cls", [RunConfig, DataConfig])
def test_help_lists_every_setting_with_type_default_and_meaning(cls):
    text = help_text(cls)
    for key, default, meaning in describe(cls):
        assert key in text and default in text and len(meaning) > 3


def test_command_line_errors_are_one_line_and_exit_code_2():
    for words, expected in (
        (["train.lrr=1"], "nearest is train.lr"),
        (["nothere.yaml"], "nothere.yaml"),
        (["a.yaml", "b.yaml"], "one config file at most"),
    ):
        done = run("launch/pretrain.py", *words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and expected in done.stderr


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and not prefix.startswith("data")
        out |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out
