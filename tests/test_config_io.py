"""config_io.py: text is taken as it stands, paths are expanded; held for every setting of all three trees."""

import dataclasses
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from clip4vla.config import DataConfig, ImportConfig, RunConfig
from clip4vla.config_io import expand_path, load, parse_yaml
from clip4vla.errors import UserError


class Setting(NamedTuple):
    """A setting of one of the trees: its class, dotted key, whether it is a text, a list or a dictionary, and a path."""

    cls: type
    key: str
    form: type
    text: bool
    path: bool

    def value(self, *words: str, file: str | Path | None = None) -> Any:
        """What it is after loading; of a dictionary its names."""
        cfg = load(self.cls, file, words)
        for name in self.key.split("."):
            cfg = getattr(cfg, name)
        return [*cfg] if self.form is dict else cfg

    def write(self, file: Path, text: str) -> Path:
        """A YAML file that gives the setting alone."""
        *parents, name = self.key.split(".")
        before, after = "".join(f"{parent}: {{" for parent in parents), "}" * len(parents)
        file.write_text(f"{before}{name}: {text}{after}", encoding="utf-8")
        return file


def below(cls: type, node: type, prefix: str = "") -> list[Setting]:
    """All settings of a tree."""
    out = []
    for item in dataclasses.fields(node):
        if dataclasses.is_dataclass(item.type):
            out += below(cls, item.type, f"{prefix}{item.name}.")
        else:
            form, inner = typing.get_origin(item.type) or item.type, typing.get_args(item.type) or (item.type,)
            out.append(Setting(cls, prefix + item.name, form, inner[0] is str, item.metadata["path"]))
    return out


EVERY = [setting for cls in (RunConfig, DataConfig, ImportConfig) for setting in below(cls, cls)]
TEXTS = [setting for setting in EVERY if setting.text]
PATHS = [setting for setting in EVERY if setting.path]
STANDS = "exp #3|2024_11_30|007|no|1e3|null|0x10|2024-11-30|1:30|a: b|- x|@x|*a|&b|!c|%d|a, b| x |=|.nan|yes"
READ = "2024_11_30|007|no|1.0e+3|0.5|2024-11-30|1:30|0x10|~|.nan|null"


@pytest.mark.parametrize("word", STANDS.split("|"))
def test_the_command_line_gives_text_as_it_stands(word):
    for setting in TEXTS:
        wanted = word if setting.form is str else [word]
        if setting.key != "model.freeze_layers":  # whose names need numbers
            assert setting.value(f"{setting.key}={word}") == wanted, setting
        if setting.form is not str and not set(word) & set(" #,:*&!@%'"):  # within brackets YAML's signs count
            listed = f"[{word}, b]" if setting.form is list else f"{{{word}: 1, b: 1}}"
            assert setting.value(f"{setting.key}={listed}") == [word, "b"], setting


def test_a_quoted_word_loses_its_quotes_and_no_other_does():
    for word, text in {
        "''": "",
        "'q'": "q",
        '"a\\tb"': "a\tb",
        "'it''s'": "it's",
        '"a" b': '"a" b',
        "'tis": "'tis",
    }.items():
        cfg = load(RunConfig, None, [f"run_dir={word}", f"init_from={word}"])
        assert (cfg.run_dir, cfg.init_from) == (text, [text])


@pytest.mark.parametrize("word", READ.split("|"))
def test_text_of_a_file_that_yaml_reads_as_something_else_is_to_be_quoted(word, tmp_path):
    for setting in TEXTS:
        forms = {list: ("{}", "[a, {}]"), dict: ("{{{}: 1}}",)}.get(setting.form, ("{}",))
        for form in forms if word not in ("~", "null") else forms[-1:]:  # no list at all is an error of its own
            with pytest.raises(UserError, match=f"x.yaml: {setting.key} is text, and YAML reads .*: put it in quotes"):
                setting.value(file=setting.write(tmp_path / "x.yaml", form.format(word)))
        if word != "~":
            quoted = setting.write(tmp_path / "x.yaml", forms[-1].format(f"'{word}'"))
            assert word in setting.value(file=quoted)
    with pytest.raises(UserError, match="command line: track=.*: track.project is text, and YAML reads"):
        load(RunConfig, None, [f"track={{project: {word}}}"])


def test_a_number_is_neither_octal_nor_a_time_of_day():
    for word in ("seed=010", "train.max_steps=1:30", "train.lr=1:30.5", "data.train={a: 1:30}"):
        with pytest.raises(UserError, match=r"must be (int|float), not '(010|1:30.*)'"):
            load(RunConfig, None, [word])
    assert load(RunConfig, None, ["train.lr=01", "seed=1_000"]).train.lr == 1.0
    assert parse_yaml("[0, -0, 0.5, 1_0, 0x1f, .inf]") == [0, 0, 0.5, 10, 31, float("inf")]


def test_a_word_that_no_file_can_hold_is_one_line():
    for word in ("run_dir=a\udcff", "data.train=\ud800", "run_dir=" + "x" * 2**19 + "x"):
        with pytest.raises(UserError, match="not valid Unicode, or more than 524288 characters"):
            load(RunConfig, None, [word])


def test_the_paths_of_the_settings_are_marked():
    assert {setting.key for setting in PATHS} == {
        "run_dir", "init_from", "model.clip", "model.audio_tower", "data.train", "data.val", "data.test", "data.cache",
        "train.mirror", "media_root", "annotations", "out",
    }  # fmt: skip


EXPANDED = {
    "~": "/home/me", "~/a b": "/home/me/a b", "$SCRATCH/a": "/big disk/~x/a", "${SCRATCH}a": "/big disk/~xa",
    "s3://b/$SCRATCH": "s3://b//big disk/~x", "./~/a": "./~/a", "a~$": "a~$", "a$5": "a$5",
}  # fmt: skip
UNKNOWN = {
    "a/$GONE/b": "$GONE is empty or not set", "${GONE:-x}/a": "${GONE:-x} is empty or not set",
    "$EMPTY/a": "$EMPTY is empty or not set", "~nobody_here/a": "there is no user nobody_here",
}  # fmt: skip


def test_home_and_variables_are_expanded_in_every_path_and_in_no_other_text(tmp_path, monkeypatch):
    for name, value in {"HOME": "/home/me", "SCRATCH": "/big disk/~x", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    for setting in PATHS:
        for word, path in EXPANDED.items():
            wanted = path if setting.form is str else [path]
            assert setting.value(f"{setting.key}={word}") == wanted
            assert setting.value(file=setting.write(tmp_path / "x.yaml", f'"{word}"')) == wanted
        for word, why in UNKNOWN.items():
            with pytest.raises(UserError) as caught:
                setting.value(f"{setting.key}={word}")
            assert str(caught.value).startswith(f"{setting.key}={word}: {why}: ")
    for setting in {*TEXTS} - {*PATHS}:
        if setting.form is not dict:
            assert "~/$GONE" in setting.value(f"{setting.key}=~/$GONE")


def test_a_path_is_expanded_where_it_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert load(RunConfig, None, ["run_dir=$GONE", "run_dir=b"]).run_dir == "b"
    (tmp_path / "a$GONE").mkdir()
    assert expand_path("$SCRATCH/a") == f"{tmp_path}/a"
    assert expand_path(f"{tmp_path}/a$GONE") == f"{tmp_path}/a$GONE"  # it is called so
    (tmp_path / "x.yaml").write_text("seed: 3")
    assert load(RunConfig, "$SCRATCH/x.yaml").seed == 3
