"""Model folders from runs: the card, ONNX, complete or absent, and every command and example of docs/weights.md."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import yaml
from forks import ROOT
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from released import SEGMENTS, checkpoint
from running import TINY, evaluation, run
from safetensors.torch import load_file

from clip4vla import cli
from clip4vla.config import ModelConfig, RunConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.export import model_card, model_folder, onnx_export
from clip4vla.models.model import Model
from clip4vla.training import pipeline

TRAINING = ("deepspeed", "nvidia", "wandb", "webdataset")

PAGE = (ROOT / "docs/weights.md").read_text()
EVALUATED = "runs/demo/eval/test,eval.audio_types=vb"  # with a setting on top of the run's
HOSTILE = "<script>alert(1)</script> | [x](javascript:a) ![y](http://e/z.png) `c` **b** www.evil.com\n# Title\n---\n"


SMALLEST = {key: value | {"layers": 1} if key.endswith("cfg") else value for key, value in TINY.items()}


def tiny_model(quick_gelu=True, channels="mono", **settings):
    torch.manual_seed(0)
    cfg = ModelConfig(**{"clip": "tiny.json"} | settings)
    return Model(SMALLEST | {"quick_gelu": quick_gelu}, cfg, SpectrogramConfig(channels=channels)).eval()


@pytest.fixture(scope="module")
def demo(tiny, sample_shards, tmp_path_factory):
    """A folder with a run of 3 steps in runs/demo, validated and evaluated at the last."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    words = [*tiny, "run_dir=runs/demo", "train.max_steps=3", "eval.every_steps=1", "eval.bootstrap=10", "preset=paper"]
    words.append(f"data.test=[{sample_shards}/speech_fr/test]")
    assert run("launch/pretrain.py", *words, cwd=folder).returncode == 0
    done = run("launch/evaluate.py", *words, "eval.audio_types=[vb]", cwd=folder)
    assert done.returncode == 0 and evaluation(folder / "runs/demo", done.stdout) == folder / EVALUATED, done.stderr
    return folder


@pytest.fixture(scope="module")
def exported(demo):
    """The card of the run's export, and the folder that it lies in."""
    done = run("launch/export.py", "runs/demo", "out/demo", cwd=demo)
    assert done.returncode == 0 and "step 3 of runs/demo" in done.stdout, done.stderr
    return ModelCard.load(demo / "out/demo/README.md"), demo / "out/demo"


def test_the_card_has_data_training_settings_and_metrics(exported, demo, sample_shards):
    card, _ = exported
    assert card.data.library_name == "clip4vla" and card.data.pipeline_tag == "feature-extraction"
    text = card.text.replace("\\", "")
    counts = [
        json.loads((sample_shards / s / "train/index.json").read_text())["counts"]["samples"]
        for s in ("speech_fr", "sounds")
    ]
    for source, count in zip(("speech_fr", "sounds"), counts, strict=True):
        assert f"| {sample_shards}/{source}/train | 50.0% | {count} |" in text
    rows = [json.loads(line) for line in (demo / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert "| steps | 3 |" in text and f"| loss at the end | {rows[-1]['loss']:.4g} |" in text
    hours = sum(12 / row["clips_per_s"] / 3600 * row["cores"] for row in rows)
    assert f"| time | {hours:.3g} CPU core h |" in text and f"| devices | {rows[-1]['cores']} CPU cores |" in text
    assert "| train.batch_size | 12 | 256 |" in text and "train.lr |" in text and "run_dir" not in text
    metrics = json.loads((demo / EVALUATED / "metrics.json").read_text())["text_to_audio"]
    assert f"| text_to_audio | {metrics['R@1']:.3g} (" in text
    assert "val-00000003:" in text and "val-00000002" not in text and "torch 2." in text


def test_the_cards_command_gives_its_metrics_again(exported, demo):
    card, _ = exported
    (command,) = re.findall(r"```bash\npython (.*)\n```", card.text)
    before = (demo / EVALUATED / "metrics.json").read_text()
    (demo / EVALUATED / "metrics.json").unlink()
    words = shlex.split(command)
    assert words[:2] == ["launch/evaluate.py", "runs/demo/config.yaml"] and any(
        "eval.audio_types" in word for word in words
    )
    done = run(*words, cwd=demo)
    assert done.returncode == 0, done.stderr
    assert (demo / EVALUATED / "metrics.json").read_text() == before


def test_metrics_of_other_weights_are_left_out(demo):
    model = Model.from_checkpoint(demo / "runs/demo/checkpoints/step-00000003")
    text = model_card.card(model, demo / "runs/demo", step=2).text
    assert "val-00000002:" in text and "val-00000003" not in text and "test:" not in text and "| steps | 2 |" in text
    assert "Not evaluated." in model_card.card(model, demo / "runs/demo", step=9).text


def test_names_are_text_and_no_markup(tmp_path):
    """A run whose every name is hostile, as a Markdown reader sees its card."""
    model = tiny_model(clip=HOSTILE)
    data = {"train": {HOSTILE: 1.0, "s3://user:secret@bucket/x?X-Amz-Signature=secret": 3.0}}
    tree = {"preset": "paper", "init_from": [HOSTILE], "data": data, "loss": {"at": 7.5}}
    (tmp_path / "config.yaml").write_text("# git 1\n" + yaml.safe_dump(tree))
    row = {"step": 1, "samples": 2, "loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "eval/test").mkdir(parents=True)
    (tmp_path / "eval/test/metrics.json").write_text(json.dumps({f"text_to_audio/{HOSTILE}": {"R@1": 5.0}}))
    (tmp_path / "eval/test/manifest.json").write_text(
        json.dumps({"settings": {"eval": {"labels": HOSTILE, "x": HOSTILE}}})
    )
    model_card.card(model, tmp_path, origin=HOSTILE).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    page = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(card.text)
    tags = set(re.findall(r"<(\w+)", page))
    assert tags == {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "ul", "li"}
    assert page.count("<h1>") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt; | [x](javascript:a)" in page
    assert "secret" not in page and "s3://bucket/x" in page and page.count("<code") == 2
    assert "75.0%" in page and "loss.at</td>\n<td>7.5" in page


ROW = {"step": 1, "samples": 2, "loss": 0.5}
BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize("file, text", [
    *(("config.yaml", text) for text in ("a: [", BOMB, "x", "data: x", "data: {train: x}", "data: {train: {a: x}}", "eval: x")),
    *(("eval/test/metrics.json", text) for text in ("[" * 99999, "[]", '{"a": 1}', '{"a": {"R@1": "x"}}')),
    ("eval/test/metrics.json", '{"a": {"R@1": 1, "ci": 1}}'),
    *(("eval/test/manifest.json", text) for text in ("{", '{"checkpoint": 1}', '{"settings": {"eval": 1}}')),
    *(("metrics.jsonl", json.dumps(ROW | {key: "x"}) + "\n") for key in ("step", "samples", "loss")),
    ("shards/index.json", '{"counts": 1}'),
], ids=lambda value: value[:30])  # fmt: skip
def test_a_broken_file_of_the_run_is_named(tmp_path, file, text):
    for name in ("eval/test", "shards"):
        (tmp_path / name).mkdir(parents=True)
    whole = {
        "config.yaml": f"data: {{train: {{{tmp_path}/shards: 1.0}}}}",
        "metrics.jsonl": json.dumps(ROW) + "\n",
        "eval/test/metrics.json": '{"a": {"R@1": 5.0}}',
        "eval/test/manifest.json": "{}",
        "shards/index.json": '{"counts": {"samples": 3}}',
    }
    for name, right in whole.items():
        (tmp_path / name).write_text(right)
    assert "100.0% | 3 |" in model_card.card(tiny_model(), tmp_path).text
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/{file}: not readable .*; correct it or remove it") as said:
        model_card.card(tiny_model(), tmp_path)
    assert "\n" not in str(said.value)


def test_a_checkpoint_without_a_number_for_its_step_is_one_line(demo, tmp_path):
    shutil.copytree(demo / "runs/demo", tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-00000003/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": "x"}))
    done = run("launch/export.py", tmp_path / "run", tmp_path / "out", cwd=demo)
    assert done.returncode == 2 and f"error: {file}: its step is 'x', no number" in done.stderr, done.stderr


@pytest.mark.parametrize("text", [BOMB, "[1]", "x"])
def test_settings_of_several_runs_that_cannot_be_read_are_named(tmp_path, text):
    pipeline.check_same_settings(tmp_path, {"run": RunConfig()})
    pipeline.check_same_settings(tmp_path, {"run": RunConfig()})
    with pytest.raises(UserError, match="its runs have run.seed"):
        pipeline.check_same_settings(tmp_path, {"run": RunConfig(seed=7)})
    older = (tmp_path / "settings.yaml").read_text().replace("run.eval.name: ''\n", "")  # by a version that had none
    (tmp_path / "settings.yaml").write_text(older)
    assert "run.eval.name" not in older and pipeline.check_same_settings(tmp_path, {"run": RunConfig()}) is None
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/settings.yaml: .* write it again"):
        pipeline.check_same_settings(tmp_path, {"run": RunConfig()})


def test_a_card_needs_no_training_package():
    names = (*TRAINING, "matplotlib", "onnx", "onnxruntime", "onnxscript")
    code = f"""import sys
for name in {names}: sys.modules[name] = None
from clip4vla.export import model_card; from clip4vla.export import model_folder as weights
from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.models.model import Model
print(model_card.card(Model({TINY}, ModelConfig(clip="t.json", head="captioner"), SpectrogramConfig())).data.pipeline_tag)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "video-text-to-text", done.stderr


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model, there = tiny_model(), tmp_path / "there"
    model_folder.save_model_folder(model, there)
    assert (there / "model.safetensors").stat().st_mode == (there / "config.json").stat().st_mode
    for place in (there, there / "config.json", there / "config.json/x"):
        with pytest.raises(UserError, match="is there already, or below a file"):
            model_folder.save_model_folder(model, place)
    (there / "README.md").write_text("mine")
    (there / "notes.txt").touch()
    model.text.text_projection.data.fill_(1e6)
    model_folder.save_model_folder(model, there, replace=True)
    assert (load_file(there / "model.safetensors")["text.text_projection"] == 1e6).all()
    assert (there / "README.md").read_text() == "mine" and (there / "notes.txt").exists()
    (tmp_path / "empty").mkdir()
    model_folder.save_model_folder(model, tmp_path / "empty", step=7)
    assert json.loads((tmp_path / "empty/config.json").read_text())["step"] == 7
    with pytest.raises(UserError, match="not finite in fp16"):
        model_folder.save_model_folder(model, tmp_path / "new", dtype="fp16")
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="audio.onnx: differs from torch by"):
        model_folder.save_model_folder(model, tmp_path / "new", onnx=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        model_folder.save_model_folder(model, tmp_path / "new", onnx=True)
    assert cli._explained(missing.value) == "error: onnxruntime is not installed: pip install 'clip4vla[onnx]'"
    assert sorted(os.listdir(tmp_path)) == ["empty", "there"]


def _same(got, want):
    want = want.detach().numpy()
    assert got.shape == want.shape and np.abs(got - want).max() / np.abs(want).max() < 1e-5


COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


def test_every_command_and_example_of_the_page_runs(demo, sample_shards, monkeypatch):
    """In its order, with a small run, the authors' reference as their checkpoint and a small CLIP as OpenAI's file."""
    monkeypatch.chdir(demo)
    checkpoint(demo)
    (demo / "pytorch_model.bin.7").rename(demo / "pytorch_model.bin.0")
    torch.save(open_clip.CLIP(**TINY, quick_gelu=True).state_dict(), demo / "ViT-B-32.pt")
    said = {}
    for line in [line for line in COMMANDS if "hf" not in line]:  # those of transformers need the hub
        words = shlex.split(line.replace("--step 440", "--step 3"))
        words += SEGMENTS if "model.head=local_local" in words else ()  # the reference's pictures are smaller than 224
        assert words[0] == "python"
        done = run(*words[1:], cwd=demo)
        assert done.returncode == 0, (line, done.stderr)
        said[line] = done.stdout
    assert len(said) == 5
    names = {"README.md", "audio.onnx", "config.json", "model.safetensors", "onnx.json", "text.onnx", "vision.onnx"}
    assert set(os.listdir("exported/demo-onnx")) == names
    assert load_file("exported/demo-onnx/model.safetensors")["logit_scale"].dtype == torch.bfloat16
    theirs, back = (torch.load(file, weights_only=True) for file in ("pytorch_model.bin.0", "back.bin"))
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key].float()) for key in theirs)
    sound = next((ROOT / "tests/sample").rglob("*.ogg"))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    found = {}
    exec(block.replace("dog.wav", str(sound)), found)
    _same(found["sound_vector"], found["model"].encode_audio(sound)[0])


def test_the_page_names_every_key(tmp_path):
    from clip4vla.export.official import HEADS, LEFT, NAMES

    listed = re.findall(r"^\| `([\w.*]+)` \|", PAGE, re.M)
    for theirs in [*NAMES.values(), *HEADS, *LEFT, "cls_linear."]:
        assert any(
            re.match(name.replace(".", r"\.").replace("*", ".*"), theirs) or name.startswith(theirs) for name in listed
        ), theirs
