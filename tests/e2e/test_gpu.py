"""What only a GPU can show: every precision under every shipped DeepSpeed config, torch.compile, NCCL, mixed decoding,
embed.py, fine-tuning with each head, captions, classification, the loss at N = 32768, and the Python API.

python -m pytest -m gpu tests/e2e/test_gpu.py        # on a machine with one GPU; with two, NCCL too
GPU_TESTS_ON=cpu python -m pytest -m gpu ...         # without: what a CPU can run of them, to see that the tests are right
"""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forks import ROOT
from media_models import SOUNDS, STILLS, make
from running import TINY, evaluation, ranks, run, trace

from clip4vla import CLIP4VLA
from clip4vla.config import DataSources, MaskConfig
from clip4vla.data import preprocessing
from clip4vla.data.loader import Loader, open_folders
from clip4vla.data.sampler import EvalSampler
from clip4vla.losses.contrastive import info_nce
from clip4vla.towers.tokenizer import tokenizer

SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))

SCRIPT = "launch/finetune_retrieval.py"
DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
cuda_alone = pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA itself")
EXACT = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}  # of the losses: TF32 and cuDNN's rounding in fp32


def totals(losses: dict[int, tuple[float, ...]]) -> list[float]:
    """The weighted sum of every step."""
    return [row[0] for row in losses.values()]


@pytest.fixture(scope="module")
def on_cpu(tiny, tmp_path_factory):
    """Losses of a run on the CPU in fp32."""
    folder = tmp_path_factory.mktemp("cpu") / "r"
    done = run("launch/pretrain.py", *tiny, f"run_dir={folder}", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return trace(folder)


@pytest.mark.parametrize("precision", EXACT)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_trains_in_every_precision_as_the_cpu_does(tiny, on_cpu, tmp_path, path, precision):
    tree = json.loads(path.read_text())
    if precision == "fp16":  # at the usual scale of 2^16 the first steps overflow, and are skipped
        tree["fp16"] |= {"initial_scale_power": 8}
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    ds = ["--deepspeed_config", tmp_path / "ds.json"]
    words = [*tiny, f"run_dir={tmp_path / 'r'}", f"train.precision={precision}", *ds]
    done = run("launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    ours = trace(tmp_path / "r")
    assert [losses[0] for losses in ours.values()] == pytest.approx(
        [losses[0] for losses in on_cpu.values()], rel=EXACT[precision]
    )
    again = run("launch/pretrain.py", *words, "train.max_steps=10")  # and it goes on from its checkpoint
    assert again.returncode == 0 and "8 done of 10" in again.stdout, again.stderr


def test_fp16_that_overflows_for_ever_ends_in_one_line(tiny, tmp_path):
    words = [*tiny, f"run_dir={tmp_path / 'r'}", "train.precision=fp16", "train.max_steps=40", "loss.at=1e9"]
    done = run("launch/pretrain.py", *words)
    assert done.returncode == 2 and "overflow fp16 with the least loss scale too" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "extra",
    [["train.compile=inductor"], ["train.activation_checkpointing=true"], ["train.gradient_accumulation_steps=3"]],
    ids=str,
)
def test_compiled_recomputed_and_accumulated_it_is_the_same(tiny, on_cpu, tmp_path, extra):
    words = [*tiny, f"run_dir={tmp_path / 'r'}", "train.precision=bf16", *extra]
    done = run("launch/pretrain.py", *words, timeout=600)
    assert done.returncode == 0, done.stderr
    ours = trace(tmp_path / "r")
    assert totals(ours) == pytest.approx(totals(on_cpu), rel=3e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_ranks_on_nccl_give_the_losses_of_one(tiny, on_cpu, tmp_path, path):
    words = [*tiny, f"run_dir={tmp_path / 'r'}", "train.precision=fp32", "--deepspeed_config", path]
    done = ranks(2, "launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    ours = trace(tmp_path / "r")
    assert totals(ours) == pytest.approx(totals(on_cpu), rel=1e-3)


@pytest.mark.parametrize("head", ["global_global", "global_local", "local_local"])
def test_every_head_is_tuned_and_evaluated_in_bf16(tuning, sample_shards, tmp_path, head):
    """Silent pictures take a sound, captions meet clips in tiles of the GPU's size, and every number is there."""
    test = f"data.test=[{sample_shards}/speech_fr/train, {sample_shards}/pictures/test]"
    words = [
        *tuning, f"run_dir={tmp_path}", f"model.head={head}", "model.head_dropout=0", "train.precision=bf16", test,
    ]  # fmt: skip
    done = run(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    losses = totals(trace(tmp_path))
    assert len(losses) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    done = run("launch/evaluate.py", *words)
    assert done.returncode == 0, done.stderr
    metrics, manifest = (
        json.loads((evaluation(tmp_path, done.stdout) / f"{name}.json").read_text()) for name in ("metrics", "manifest")
    )
    assert set(metrics) == {f"{way}{kind}" for way in ("text_to_video", "video_to_text") for kind in ("", "/v", "/a")}
    assert all(row["n_queries"] and row["R@1"] <= row["R@10"] for row in metrics.values())
    assert manifest["silent"]["filled"] == 2


def test_captions_are_learnt_in_bf16_and_written_as_on_the_cpu(tiny, sample_shards, tmp_path):
    words = [
        *tiny, f"run_dir={tmp_path}", "loss={at: 0, av: 0, aa: 0, caption: 1}", "model.head=captioner", "data.languages=[en]",
        f"data.train={sample_shards}/speech_fr/train", f"data.test={sample_shards}/speech_fr/train", "model.head_layers=2",
        "model.trainable_towers=text+vision+audio", "eval.task=captioning", "train.precision=bf16", "train.max_steps=20",
    ]  # fmt: skip
    done = run("launch/finetune_captioning.py", *words)
    assert done.returncode == 0, done.stderr
    losses = totals(trace(tmp_path))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    written = []
    for method, env in itertools.product(("beam", "greedy", "nucleus"), ({}, {"CUDA_VISIBLE_DEVICES": ""})):
        done = run("launch/evaluate.py", *words, f"decode.method={method}", env=env)
        assert done.returncode == 0, done.stderr
        written.append(json.loads((evaluation(tmp_path, done.stdout) / "results.json").read_text()))
    assert written[0] == written[1] and written[2] == written[3] and len(written[4]) == len(written[5]) == 18


def test_probes_are_those_of_the_cpu_and_a_classifier_learns_in_bf16(tiny, sample_shards, tmp_path):
    folds = ", ".join(f"{sample_shards}/speech_{lang}/train" for lang in ("es", "fr"))
    words = [*tiny, f"data.test=[{folds}]", "data.train={}", "eval.task=classification", "classify.cross_validate=true"]
    probes, script = [], "launch/finetune_classification.py"
    for name, env in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        done = run(script, *words, f"run_dir={tmp_path}/{name}", "train.max_steps=0", env=env)
        assert done.returncode == 0, done.stderr
        probes.append(json.loads((tmp_path / name / "eval/test/metrics.json").read_text())["label"])
    assert probes[0]["confusion"] == probes[1]["confusion"] and probes[0]["C"] == probes[1]["C"]
    words += [
        "model.head=classifier",
        "classify.method=classifier",
        "loss={at: 0, av: 0, aa: 0, label: 1}",
        "train.max_steps=20",
    ]
    done = run(
        script, *words, "model.trainable_towers=vision+audio", "train.precision=bf16", f"run_dir={tmp_path}/tuned"
    )
    assert done.returncode == 0, done.stderr
    losses = totals(trace(tmp_path / "tuned/speech_fr-train"))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@cuda_alone
def test_mixed_decoding_gives_the_pictures_of_the_cpu(sample_shards, tmp_path):
    """nvJPEG and libjpeg-turbo round differently: a few grey levels, and at the edges of colours more."""
    folders = open_folders({str(sample_shards / name / "train"): 1.0 for name in ("pictures", "sounds")}, "data.train")
    order = EvalSampler([[shard.samples for shard in folder.shards] for folder in folders], 8)
    made = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        loader = Loader(
            folders, order, DataSources(), tokenize=tokenizer("ViT-B-32", 32), mask=MaskConfig(), seed=0,
            needs=("frames", "fbank"), device=device, damage_log=tmp_path / "corrupt.jsonl",
        )  # fmt: skip
        batches = []
        for k in range(len(order)):
            if device.type == "cuda":
                torch.cuda._sleep(100_000_000)  # training is behind: what it has not used yet must not be overwritten
            batches.append(loader.batch(k))
        made.append([batch.to(torch.device("cpu")) for batch in batches])
    for cpu, gpu in zip(*made, strict=True):
        assert cpu.ids == gpu.ids and torch.equal(cpu.segment_rows, gpu.segment_rows)
        for ours, theirs in ((gpu.frames, cpu.frames), (gpu.segments, cpu.segments)):
            apart = (ours.int() - theirs.int()).abs()
            assert not apart.numel() or (apart.float().mean() < 1 and (apart > 8).float().mean() < 0.01)


def test_vectors_of_the_gpu_are_those_of_the_cpu(tiny, sample_shards, tmp_path):
    (tmp_path / "clip.json").write_text(json.dumps(TINY))
    done = run("launch/pretrain.py", *tiny, f"run_dir={tmp_path / 'clip'}", "model.trainable_towers=text+vision",
               "loss={at: 0, av: 0, aa: 0, tv: 1}", f"data.train={sample_shards}/pictures/train", "train.max_steps=1",
               "train.batch_size=4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = []
    for name, env in (("cpu", {"CUDA_VISIBLE_DEVICES": ""}), ("gpu", {})):
        shards = tmp_path / name
        copied = run("data_prep/shard.py", "configs/data/sample.yaml", f"out={shards}")
        assert copied.returncode == 0, copied.stderr
        data = [f"data.train={shards}/pictures/train", "data.val={}", f"init_from=[{tmp_path / 'clip'}]"]
        done = run("data_prep/embed.py", *tiny, *data, f"run_dir={tmp_path / 'none'}", env=env)
        assert done.returncode == 0, done.stderr
        found.append(torch.cat([_vectors(tar) for tar in sorted(Path(shards, "pictures/train/clip").glob("*.tar"))]))
    assert F.cosine_similarity(*found).min() > 0.999


def _vectors(tar: Path) -> torch.Tensor:
    import tarfile

    with tarfile.open(tar) as members:
        data = b"".join(members.extractfile(member).read() for member in members)
    return torch.frombuffer(bytearray(data), dtype=torch.float16).view(-1, TINY["embed_dim"]).float()


@cuda_alone
def test_the_loss_of_32768_clips_needs_no_matrix():
    """The matrix alone would take 4.3 GB in fp32; the value is that of float64, computed row block by row block."""
    n, scale = 32768, 50.0
    a, b = (F.normalize(torch.randn(n, 512, device="cuda"), dim=-1) for _ in range(2))
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = info_nce(*leaves, torch.tensor([scale], device="cuda"), torch.ones(n, dtype=torch.bool, device="cuda"))
    value.backward()
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < n * n * 4 / 4, f"{grown / 2**30:.2f} GiB"
    rows = sum(_sum_log(x, y, scale) for x, y in ((a, b), (b, a)))
    assert value.item() == pytest.approx(rows / (2 * n), rel=1e-4) and math.isfinite(leaves[0].grad.sum())


def _sum_log(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    total = 0.0
    for i in range(0, len(a), 1024):
        logits = scale * a[i : i + 1024].double() @ b.double().T
        total += float((logits.logsumexp(1) - logits.diagonal(i)).sum())
    return total


@pytest.mark.parametrize("head", ["global_global", "global_local", "local_local", "captioner"])
@pytest.mark.parametrize(
    "dtype, close", [(torch.float32, 0.9999), (torch.bfloat16, 0.995), (torch.float16, 0.999)], ids=str
)
def test_the_api_gives_what_it_gives_on_a_cpu(head, dtype, close, tmp_path):
    model = make(head=head)
    model.save_pretrained(tmp_path)
    there = CLIP4VLA.from_pretrained(tmp_path, device=DEVICE, dtype=dtype)
    sounds = [*SOUNDS[:3], (torch.zeros(16000) + torch.linspace(-1, 1, 16000), 16000)]
    for name, things in (("text", ["a dog", "a cat"]), ("audio", sounds), ("video", STILLS[:3])):
        got, want = (getattr(m, f"encode_{name}")(things) for m in (there, model))
        assert got.device.type == DEVICE and F.cosine_similarity(got.cpu(), want).min() > close
    media = [(STILLS[0], SOUNDS[0]), SOUNDS[1], (STILLS[1], None)]
    assert there.similarity(["a dog", "a cat"], media).shape == (2, 3)
    clips = [preprocessing.read(sound, there.spectrogram, there.frames, "a") for sound in SOUNDS[:2]]
    assert there.similarity(there.encode_text("a dog"), there.encode(clips, ["both"])["both"]).shape == (1, 2)
    frames = torch.zeros(2, 64, 64, 3, dtype=torch.uint8, device=DEVICE)
    assert there.encode_video(frames).shape == (1, 64) and there.classify(media, ["a", "b"]).shape == (3, 2)
    if head == "captioner":
        assert len(there.caption(media, num_beams=2, max_new_tokens=4)) == 3
