"""The journey a newcomer makes, on the shipped sample in a copy of the checkout: the demo, its page, the README's commands."""

import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import browse
from forked_python import forked_python
from forks import ROOT
from running import PATIENCE, free_port, job, ranks


def left(folder: str, names: list[str]) -> list[str]:
    """What is not copied: git's and what runs leave at the top, and what Python leaves anywhere."""
    top = {".git", ".venv", "data", "runs", "wandb"} if Path(folder) == ROOT else set()
    return [name for name in names if name in top or name == "__pycache__" or name.endswith(".egg-info")]


def shell(command: str, folder: Path, timeout: float = 1800, path: str = "") -> subprocess.CompletedProcess:
    path += f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def run_demo(folder: Path) -> subprocess.CompletedProcess:
    """Its `python` runs forks; that a script starts as a process of its own is held by the README's commands below."""
    with forked_python() as path:
        return shell("bash launch/demo.sh sample", folder, path=f"{path}:")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, what was printed) after the demo on the sample."""
    folder = tmp_path_factory.mktemp("demo") / "clip4vla"
    shutil.copytree(ROOT, folder, ignore=left)
    done = run_demo(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_it_ends_with_the_table_and_the_page(demo):
    folder, out = demo
    assert re.search(r"^text_to_audio/nb +100\.0", out, re.M) and "report: runs/sample/report.html" in out
    for name in ("config.yaml", "metrics.jsonl", "eval/test/metrics.json", "report.html", "log.txt"):
        assert (folder / "runs/sample" / name).stat().st_size > 0


def test_it_learns_its_training_items_by_heart(demo):
    metrics = json.loads((demo[0] / "runs/sample/eval/test/metrics.json").read_text())
    for one, other in (("text", "video"), ("text", "audio"), ("audio", "video")):
        for direction in (f"{one}_to_{other}", f"{other}_to_{one}"):
            assert set(metrics[direction]) == {
                "R@1",
                "R@5",
                "R@10",
                "MedR",
                "MeanR",
                "n_queries",
                "n_gallery",
                "p_value",
                "chance",
                "ci",
            }
            assert metrics[direction]["p_value"] < 0.01
    for direction in (
        "text_to_video",
        "video_to_text",
        "text_to_audio",
        "audio_to_text",
        "audio_to_video",
        "text_to_audio/nb",
    ):
        assert metrics[direction]["R@1"] == 100, direction
    assert {"text_to_audio/vb", "text_to_audio/vb-fr", "audio_to_video/nb", "video_to_audio/vb-es"} <= set(metrics)


def test_every_type_token_is_evaluated(demo):
    folder = demo[0] / "runs/sample/eval/test"
    found = {
        name: json.loads((folder / f"metrics{name}.json").read_text()) for name in ("", "-vb", "-nb", "-both", "-0.5")
    }
    assert all(set(metrics) == set(found[""]) for metrics in found.values())
    pictures = [metrics["text_to_video"] for metrics in found.values()]
    assert all(metrics == pictures[0] for metrics in pictures)  # the token changes nothing of what is seen


def test_its_page_opens_in_a_browser_with_all_pictures_and_players(demo, tmp_path):
    found, console = browse(demo[0] / "runs/sample/report.html", tmp_path)
    assert console == [] and found["outside"] == 0
    assert found["images"] == found["loaded"] > 100 and found["players"] > 20 and found["cards"] == 20
    assert found["right"] >= 20


def test_again_it_says_that_all_is_done(demo):
    folder, _ = demo
    before = (folder / "runs/sample/metrics.jsonl").read_bytes()
    done = run_demo(folder)
    assert done.returncode == 0 and "150 done of 150" in done.stdout
    assert (folder / "runs/sample/metrics.jsonl").read_bytes() == before


def test_two_ranks_evaluate_as_one(demo):
    """The ranks are forks: the launcher is the subject above and below."""
    folder, _ = demo
    found = folder / "runs/sample/eval/test/metrics.json"
    one = json.loads(found.read_text())
    found.unlink()
    test = ",".join(
        f"{folder}/data/sample/{source}/train" for source in ("pictures", "speech_fr", "speech_es", "sounds")
    )
    words = [
        "configs/pretrain/sample.yaml",
        f"run_dir={folder}/runs/sample",
        f"data.test=[{test}]",
        "eval.audio_types=[data]",
    ]
    done = ranks(2, "launch/evaluate.py", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text()) == one


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


SMALLER = {  # what lets a command run on the sample, which has three of the languages; everything else runs as it stands
    "data_prep/shard.py configs/data/stamps.yaml": "media_root=tests/sample",
    "launch/pretrain.py --deepspeed_config ds.json": "train.max_steps=2 train.batch_size=24 "
    "data.train=[data/stamps/speech_fr/train,data/stamps/sounds/train]",
    "configs/finetune/stamps_retrieval.yaml": "train.max_steps=2 train.batch_size=12 eval.every_steps=2 "
    "data.train=[data/stamps/speech_fr/train] data.val=data/stamps/speech_fr/train data.test=data/stamps/speech_es/train",
    "configs/finetune/stamps_captioning.yaml": "train.max_steps=2 train.batch_size=12 eval.every_steps=2 decode.num_beams=2 "
    "data.train=data/stamps/speech_fr/train data.val=data/stamps/speech_fr/test data.test=data/stamps/speech_es/train",
    "configs/finetune/stamps_classification.yaml": "classify.shots=[1] classify.n_draws=1 "
    "data.train=data/stamps/speech_fr/train data.test=data/stamps/speech_es/train",
    "python launch/evaluate.py\n": "data.test=[data/stamps/pictures/test,data/stamps/speech_fr/test,data/stamps/sounds/test]",
}


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_runs(demo, command, no_java):
    """In the order of the README, on the sample; the make targets are this test's own set-up and `demo` above."""
    folder, _ = demo
    words = shlex.split(command)
    if words[0] == "make":
        done = shell(f"make -n {shlex.join(words[1:])}", folder)
        assert done.returncode == 0 and any(
            part in done.stdout for part in ("launch/demo.sh", "pytest", "launch/results.py")
        )
        return
    if "clip4vla." in command:
        search(command.replace("runs/demo", "runs/sample").replace("data/stamps", "data/sample"), folder)
        return
    smaller = next((extra for part, extra in SMALLER.items() if part in command + "\n"), "")
    if "ds.json" in command:
        done = shell(f"{command} {smaller}".replace("deepspeed ", f"deepspeed --master_port {free_port()} ", 1), folder)
    else:  # forks: the launcher is the subject above, and starting it takes the longest; so does METEOR's Java
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))
        run = [*expanded(words[first:], folder), *shlex.split(smaller)]
        with job(2 if words[0] == "deepspeed" else 1, *run, env=no_java, cwd=folder) as started:
            done = started.wait()
    assert done.returncode == 0, done.stdout + done.stderr


def search(command: str, folder: Path) -> None:
    """With what the demo left; the page is asked for once, then interrupted."""
    if "clip4vla.web" not in command:
        done = shell(command, folder)
        assert done.returncode == 0 and done.stdout, done.stderr
        return
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *shlex.split(command)[1:], "--port", str(port)]
    with subprocess.Popen(
        words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as page:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}") as answer:
                    assert b"<html" in answer.read()
                    break
                assert page.poll() is None, page.stdout.read()
                time.sleep(0.1)
            else:
                raise AssertionError("no page")
        finally:
            page.send_signal(signal.SIGINT)
            page.wait(PATIENCE)


def expanded(words: list[str], folder: Path) -> list[str]:
    """As the shell does."""
    return [name for word in words for name in (sorted(glob.glob(word, root_dir=folder)) or [word])]
