"""The loop: ranks, precision, ZeRO stages, kills, signals, resume, and bad input."""

import json
import random
import shutil
import subprocess

import pytest
import torch
from forks import HELPERS, ROOT
from rank_scripts import DRIVER, SIGNALLED
from running import STEPS, TINY, deepspeed, job, ranks, run, trace, wait_for
from safetensors.torch import load_file

from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.training import engine

AFTER_A_STEP = {"module": "checkpoints.manager", "name": "CheckpointManager", "method": "should_save"}
SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A run of two ranks from start to end."""
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    done = ranks(2, "launch/pretrain.py", *tiny, f"run_dir={folder}")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder, done.stdout


def test_two_ranks_train_log_and_save(undisturbed, tiny):
    folder, out = undisturbed
    losses = trace(folder)
    assert list(losses) == list(range(1, STEPS + 1))
    assert "2 ranks, ZeRO-1, fp32, global batch 12" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "samples", "lr", "loss", "loss/at", "loss/av", "loss/aa", "grad_norm", "clips_per_s", "data_wait_fraction",
            "masked_fraction", "memory_gib"} <= set(rows[-1])  # fmt: skip
    cfg = load(RunConfig, tiny[0], tiny[1:]).train
    assert [row["lr"] for row in rows] == [engine.learning_rate(step, cfg) for step in range(STEPS)]
    assert rows[-1]["samples"] == STEPS * 12 and 0 < rows[-1]["masked_fraction"] < 1
    assert sorted(p.name for p in (folder / "checkpoints").glob("*-*")) == ["step-00000006", "step-00000008"]
    assert (folder / "checkpoints/latest").read_text() == "step-00000008"
    assert "# torch 2." in (folder / "config.yaml").read_text()


def test_kill_9_of_one_rank_at_a_random_step_then_resume_gives_the_same_losses_to_the_last_bit(
    undisturbed, tiny, tmp_path
):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    step, victim = rng.randint(3, STEPS), rng.randint(0, 1)  # 3: step 2 is saved
    said = f"seed {seed}: rank {victim} killed in step {step}"
    words, script = [*tiny, f"run_dir={tmp_path / 'r'}"], tmp_path / "killed.py"
    script.write_text(SIGNALLED.format(**AFTER_A_STEP, rank=victim, when=f"arguments[-1] == {step}", signal="SIGKILL"))
    assert ranks(2, script, *words).returncode != 0, said
    assert list(trace(tmp_path / "r")) == list(range(1, step)), said
    done = ranks(2, "launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    assert f"weights from {tmp_path / 'r/checkpoints/step-0000000'}" in done.stdout, said
    assert trace(tmp_path / "r") == trace(undisturbed[0]), said
    ours, theirs = (
        load_file(f / "checkpoints/step-00000008/model.safetensors") for f in (tmp_path / "r", undisturbed[0])
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), said


def test_usr1_to_one_rank_saves_and_exits_85_and_the_run_goes_on_from_there(undisturbed, tiny, tmp_path):
    words, script = [*tiny, f"run_dir={tmp_path / 'r'}", "train.save_every=1000"], tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(**AFTER_A_STEP, rank=1, when="arguments[-1] == 3", signal="SIGUSR1"))
    assert ranks(2, script, *words).returncode == 85
    (saved,) = (tmp_path / "r/checkpoints").glob("step-*")
    assert max(trace(tmp_path / "r")) == int(saved.name[-8:]) < STEPS
    assert ranks(2, "launch/pretrain.py", *words).returncode == 0
    assert trace(tmp_path / "r") == trace(undisturbed[0])


def test_term_saves_and_exits_85(tiny, tmp_path):
    words = [*tiny, f"run_dir={tmp_path / 'r'}", "train.save_every=1000", "train.max_steps=500"]
    with job(1, "launch/pretrain.py", *words) as one:
        wait_for(tmp_path / "r/metrics.jsonl", 2)
        one.ranks[0].terminate()
        assert one.wait().returncode == 85
    (saved,) = (tmp_path / "r/checkpoints").glob("step-*")
    assert max(trace(tmp_path / "r")) == int(saved.name[-8:])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_agree(undisturbed, tiny, tmp_path, stage):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # nothing is too small to be partitioned
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    words = [*tiny, f"run_dir={tmp_path / 'r'}", "--deepspeed_config", tmp_path / "ds.json", "eval.every_steps=4"]
    done = ranks(2, "launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    ours, theirs = trace(tmp_path / "r"), trace(undisturbed[0])
    for step in (4, 8):  # evaluation in between changes nothing, and works on partitioned weights
        metrics = json.loads((tmp_path / f"r/eval/val-{step:08d}/metrics.json").read_text())
        assert metrics["text_to_audio"]["n_gallery"] == 4
    for step, losses in theirs.items():
        assert ours[step] == pytest.approx(losses, rel=1e-5)
    shapes = [{k: v.shape for k, v in load_file(f / "checkpoints/step-00000008/model.safetensors").items()}
              for f in (tmp_path / "r", undisturbed[0])]  # fmt: skip
    assert shapes[0] == shapes[1]
    if stage == 3:  # continued from an earlier checkpoint, it ends the same
        shutil.rmtree(tmp_path / "r/checkpoints/step-00000008")
        done = ranks(2, "launch/pretrain.py", *words)
        assert done.returncode == 0 and "6 done of 8" in done.stdout, done.stderr
        assert trace(tmp_path / "r") == ours


def test_whole_clips_and_changed_sounds_train_the_same_on_ranks_split_and_in_pieces(tiny, zero3, tmp_path):
    reading = [
        "model.audio_patch=[16,224]",
        "model.audio_span=clip",
        "model.audio_pool=mean",
        "model.spectrogram_norm=clip",
    ]
    words = [
        *tiny,
        *reading,
        "augment={time_shift: 20, mel_shift: 4, time_masks: 1, mel_masks: 1}",
        "train.max_steps=3",
    ]
    pieces = ["train.gradient_accumulation_steps=3", "train.activation_checkpointing=true"]
    traces = []
    plain = "augment={time_shift: 0, mel_shift: 0, time_masks: 0, mel_masks: 0}"
    for number, (count, more) in enumerate([(1, []), (2, ["--deepspeed_config", zero3]), (2, pieces), (1, [plain])]):
        done = ranks(count, "launch/pretrain.py", *words, f"run_dir={tmp_path / str(number)}", *more)
        assert done.returncode == 0, done.stderr
        traces.append(trace(tmp_path / str(number)))
    for step, losses in traces[0].items():
        assert all(other[step] == pytest.approx(losses, rel=1e-5) for other in traces[1:3])
        assert traces[3][step] != pytest.approx(losses, rel=1e-3)  # of sounds that are not changed


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_deepspeed_config_trains(undisturbed, tiny, tmp_path, path):
    words = [*tiny, f"run_dir={tmp_path / 'r'}", "train.precision=bf16", "train.max_steps=2", "train.warmup_ratio=0.5"]
    done = ranks(2, "launch/pretrain.py", *words, "--deepspeed_config", path)
    assert done.returncode == 0, done.stderr
    assert trace(tmp_path / "r")[1] == pytest.approx(
        trace(undisturbed[0])[1], rel=2e-2
    )  # weights of the start, in bf16


def test_one_rank_gives_the_losses_of_two(undisturbed, tiny, tmp_path):
    """The negatives are those of the global batch, and the order of samples is the same, on any number of ranks."""
    done = run("launch/pretrain.py", *tiny, f"run_dir={tmp_path / 'r'}")
    assert done.returncode == 0, done.stderr
    ours, theirs = trace(tmp_path / "r"), trace(undisturbed[0])
    for step, losses in theirs.items():
        assert ours[step] == pytest.approx(losses, rel=1e-5)


def test_bf16_trains_and_resumes(tiny, tmp_path):
    words = [*tiny, f"run_dir={tmp_path / 'r'}", "train.precision=bf16"]
    assert run("launch/pretrain.py", *words, "train.max_steps=4").returncode == 0
    done = run("launch/pretrain.py", *words, "train.max_steps=6")
    assert done.returncode == 0 and "bf16" in done.stdout and "4 done of 6" in done.stdout, done.stderr
    losses = trace(tmp_path / "r")
    assert len(losses) == 6 and all(v == v for row in losses.values() for v in row)


def test_a_half_written_checkpoint_is_never_taken(undisturbed, tiny, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "r")
    folder = tmp_path / "r/checkpoints"
    (folder / "step-00000008").rename(folder / "partial-00000008")
    (folder / "partial-00000008/model.safetensors").write_bytes(b"half")
    done = ranks(2, "launch/pretrain.py", *tiny, f"run_dir={tmp_path / 'r'}")
    assert done.returncode == 0 and "6 done of 8" in done.stdout
    assert trace(tmp_path / "r") == trace(undisturbed[0])


BAD = [
    (["data.train=nowhere"], "no shards found in nowhere"),
    (["--deepspeed_config", "missing.json"], "missing.json"),
    (["--deepspeed_config", "README.md"], "README.md: not valid JSON"),
    (["train.precision=fp16"], "train.precision: fp16 is not supported on c"),  # cpu or cuda, as half.py makes it
    (["train.batch_size=100000"], "fewer than its"),
    (["init_from=runs/none"], "init_from: no checkpoint in runs/none"),
    (["model.clip=nope.json"], "model.clip: nope.json"),
    (["model.trainable_towers=sound"], "model.trainable_towers: 'sound'"),
    (["model.head=local_local"], "model.head=local_local"),
    (["train.batch_size=0"], "train.batch_size must be at least 1"),
    (["loss={at: 0, av: 0, aa: 0}"], "every weight is 0"),
    (["augment.mix=0.5"], "augment.mix=0.5: two sounds in one"),
    (["data.train={x: 0}"], "no shards found in x"),
    (["eval.audio_types=[loud]"], "eval.audio_types must be vb, nb, both"),
    (["eval.every_steps=2", "data.val=[]"], "data.val names no shard folder"),
    (["run_dir=/proc/nothing"], "run_dir /proc/nothing: cannot be written"),
]


@pytest.fixture(scope="module")
def refusals(tiny, tmp_path_factory):
    """(exit code, stderr) of launch/pretrain.py for each of BAD: one process without fp16 runs them all."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "refused.py").write_text(
        f"import sys\nsys.path.append({str(HELPERS)!r})\nimport half\nhalf.answer(False)\n{DRIVER}"
    )
    words = ["launch/pretrain.py", *map(str, tiny)]
    cases = [[*words, f"run_dir={folder / str(n)}", *more] for n, (more, _) in enumerate(BAD)]
    done = run(folder / "refused.py", json.dumps(cases))
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, _, said in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize("number", range(len(BAD)), ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(refusals, number):
    code, said = refusals[number]
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and BAD[number][1] in said


def test_two_ranks_say_it_once(tiny):
    _refused(deepspeed(2, "launch/pretrain.py", *tiny, "data.train=nowhere"), "no shards found in nowhere")


def test_towers_of_another_picture_size_read_the_same_shards(tiny, tmp_path):
    clip = tmp_path / "large.json"
    clip.write_text(json.dumps(TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 256}}))
    done = run("launch/pretrain.py", *tiny, f"run_dir={tmp_path / 'r'}", f"model.clip={clip}", "loss.av=1")
    assert done.returncode == 0, done.stderr
    assert "frames resized 224 -> 256 by DALI, bicubic" in done.stdout and len(trace(tmp_path / "r")) == STEPS


def test_ds_json_that_contradicts_the_yaml_names_both(tiny, tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 64}')
    words = ["--deepspeed_config", tmp_path / "ds.json"]
    _refused(run("launch/pretrain.py", *tiny, *words), "train_batch_size=64 contradicts train.batch_size=12")


def test_a_checkpoint_of_another_model_or_fingerprint_is_refused(undisturbed, tiny, sample_shards, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "r")
    words = [*tiny, f"run_dir={tmp_path / 'r'}"]
    _refused(
        run("launch/pretrain.py", *words, "model.clip=configs/clip/small.json"),
        "a checkpoint of another model: embed_dim is 64",
    )
    shards = tmp_path / "shards"
    shutil.copytree(sample_shards, shards)
    for index in shards.rglob("index.json"):
        index.write_text(
            index.read_text().replace('"n_fft": 1024', '"n_fft": 512').replace('"n_fft":1024', '"n_fft":512')
        )
    data = f"data.train={{{shards}/speech_fr/train: 0.5, {shards}/sounds/train: 0.5}}"
    _refused(run("launch/pretrain.py", *words, data), "spectrogram.n_fft is 1024 there and 512 here")


def test_an_empty_split_is_named(tiny, sample_shards, tmp_path):
    shutil.copytree(sample_shards / "speech_fr/train", tmp_path / "s")
    index = json.loads((tmp_path / "s/index.json").read_text())
    (tmp_path / "s/index.json").write_text(json.dumps(index | {"shards": []}))
    _refused(run("launch/pretrain.py", *tiny, f"data.train={tmp_path / 's'}"), "is empty: no samples")


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tiny, tmp_path):
    done = run(
        "launch/pretrain.py",
        *tiny,
        f"run_dir={tmp_path / 'r'}",
        "train.lr=1e30",
        "train.grad_clip_norm=0",
        "train.warmup_ratio=0",
    )
    _refused(done, "is nan")
    saved = [load_file(f) for f in (tmp_path / "r/checkpoints").glob("step-*/model.safetensors")]
    assert len(saved) <= 1  # at most the state before the loss broke


def _refused(done: subprocess.CompletedProcess, expected: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and expected in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_the_official_preset_from_media_to_a_trained_step(tiny, tmp_path):
    """Left/mid/right spectrograms with the released code's window, FFT, blank segment, normalisation and masks."""
    out = tmp_path / "shards"
    done = run("data_prep/shard.py", "configs/data/sample.yaml", f"out={out}", "preset=official")
    assert done.returncode == 0, done.stderr
    data = f"data.train={{{out}/speech_fr/train: 0.5, {out}/sounds/train: 0.5}}"
    words = [*tiny, data, "preset=official", f"run_dir={tmp_path / 'r'}", "train.max_steps=2", "train.batch_size=8"]
    done = run("launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "r/checkpoints/step-00000002/config.json").read_text())
    assert saved["spectrogram"]["channels"] == "lmr" and saved["model"]["spectrogram_norm"] == "padded"
    _refused(
        run("launch/pretrain.py", *tiny, f"run_dir={tmp_path / 'r'}"),
        "spectrogram.window is 'hann' there and 'hamming' here",
    )
