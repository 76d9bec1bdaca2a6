"""launch/gpu_check.py: time limits, what is skipped, results after each check; wheels in pieces; the GPU's tests, on a CPU."""

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile

import pytest
from forks import ROOT
from running import run

from launch.gpu import packages
from launch.gpu.checks import CHECKS, Check, run_all


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of a check that prints figures, one that fails, one that is stopped, and one for which no time is left."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "figures.py").write_text("print('{\"mfu\": 0.5}')")
    (folder / "fails.py").write_text(f"print(open('{folder}/out.json').read()); raise SystemExit('no kernel image')")
    hangs = f"import subprocess, time; subprocess.Popen(['sleep', '{os.getpid()}.5']); time.sleep(60)"
    (folder / "hangs.py").write_text(hangs)
    checks = [
        Check(name, f"python {folder}/{name}.py", limit) for name, limit in (("figures", 9), ("fails", 9), ("hangs", 1))
    ]
    start = time.monotonic()
    returned = run_all((*checks, checks[2]._replace(name="late")), 10.5, folder / "out.json", {"gpu": "none"})
    assert time.monotonic() - start < 9
    written = json.loads((folder / "out.json").read_text())
    assert written == json.loads(json.dumps(returned))
    return written


def test_figures_are_kept_and_a_failure_with_its_last_words(results):
    assert results["gpu"] == "none"
    figures, fails = (results["checks"][name] for name in ("figures", "fails"))
    assert figures["figures"] == {"mfu": 0.5} and figures["exit"] == 0 and "stdout" not in figures
    assert fails["exit"] == 1 and "no kernel image" in fails["stderr"]
    earlier = json.loads(fails["stdout"])  # what lay on the disk when the second check ran
    assert earlier["checks"]["figures"] == figures and set(earlier["skipped"]) == {"fails", "hangs", "late"}


def test_a_check_is_stopped_at_its_limit_with_all_its_processes(results):
    hangs = results["checks"]["hangs"]
    assert hangs["exit"] is None and 1 <= hangs["seconds"] < 5
    assert subprocess.run(["pgrep", "-f", f"sleep {os.getpid()}.5"], capture_output=True, check=False).returncode == 1


def test_a_check_without_time_is_skipped_and_says_so(results):
    assert list(results["skipped"]) == ["late"] and results["skipped"]["late"].endswith("s were left")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_is_a_command_that_its_script_takes(check):
    program, script, *words = shlex.split(check.command)
    if script == "launch/bench.py":
        (path,) = ROOT.glob(f"launch/bench/*/{words[0]}.py")
        parser = argparse.ArgumentParser()
        importlib.import_module(f"launch.bench.{path.parent.name}.{path.stem}").add_arguments(parser)
        assert parser.parse_args(words[1:])
    else:
        files = [word for word in (script, *words) if "/" in word]
        assert program in ("python", "bash") and files and all((ROOT / file).is_file() for file in files)


def test_the_limits_are_longer_than_the_nine_minutes_by_little_and_the_first_check_leaves_time():
    assert 540 < sum(check.seconds for check in CHECKS) < 800 and CHECKS[0].seconds <= 540 / 3


def test_without_a_gpu_it_is_one_line():
    done = run("launch/gpu_check.py", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "needs a GPU" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_gpus_tests_run_on_a_cpu_too():
    words = ["-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "tests/e2e/test_gpu.py"]
    done = run(*words, "-k", "api_gives and float32", env={"GPU_TESTS_ON": "cpu"})
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-3000:]


def test_what_training_needs_is_collected_without_what_pytorch_brings():
    needed = packages.missing([])
    assert {
        "deepspeed",
        "hjson",
        "open-clip-torch",
        "nvidia-dali-cuda130",
        "webdataset",
        "wandb",
        "scikit-video",
    } <= needed
    assert not {"torch", "torchvision", "numpy", "triton", "pytest", "clip4vla"} & needed
    assert "ftfy" in needed and "ftfy" not in packages.missing(["ftfy", "Open_CLIP_torch"])


def test_wheels_are_cut_into_folders_and_installed_from_the_pieces(tmp_path):
    whole = tmp_path / "out/whole"
    whole.mkdir(parents=True)
    for name, size in (("large", 250_000), ("middle", 90_000), ("small", 5_000)):
        _wheel(whole, name, os.urandom(size))
    size = 100_000
    folders = packages.pack(whole, tmp_path / "out", size)
    assert [sum(f.stat().st_size for f in folder.glob("*.w*")) <= size for folder in folders] == [True] * len(folders)
    assert not whole.exists() and len(folders) == 4
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    subprocess.run(["sh", folders[0] / "install.sh", tmp_path / "site"], check=True, env=env, cwd=tmp_path)
    sizes = {path.parent.name: path.stat().st_size for path in (tmp_path / "site").rglob("data.bin")}
    assert sizes == {"large": 250_000, "middle": 90_000, "small": 5_000}


def _wheel(folder, name: str, data: bytes) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/data.bin", data)
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_a_folder_of_wheels_is_never_written_over(tmp_path):
    done = run("launch/gpu_check.py", "--wheels", tmp_path)
    assert done.returncode == 2 and "it is there already" in done.stderr
