"""flops.py and meter.py: FLOPs against torch's own counter, bytes against the collectives of real runs, the audio space."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from forks import ROOT
from made_batch import batch
from running import TINY, ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from traffic import made_up

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.distributed import collectives
from clip4vla.losses.objective import bytes_sent
from clip4vla.models import fusion
from clip4vla.models.model import Model
from clip4vla.training import engine, flops
from clip4vla.training.meter import Meter, audio_space
from clip4vla.training.run_setup import RunSetup

STEPS = 3


def matrices(features, cfg):
    """The terms of the loss as plain autograd takes them: every similarity matrix whole."""
    audio, masked = features["audio"], features.get("masked")
    pairs = [(features["text"], audio)] * bool(cfg.at) + [(features["vision"], audio)] * bool(cfg.av)
    pairs += [(audio, masked), (audio, audio), (masked, masked)] if cfg.aa else []
    return sum((a @ b.T).exp().sum() for a, b in pairs)


@pytest.mark.parametrize("towers, aa", [("audio", 1), ("audio+text+vision", 1), ("audio+text", 0)])
def test_useful_flops_are_those_that_torch_counts(towers, aa):
    """But for 3%: the text's projection counts at [EOS] alone. Padding adds nothing."""
    cfg = load(RunConfig, None, [f"model.trainable_towers={towers}", f"loss.aa={aa}"])
    model = Model(TINY, cfg.model, SpectrogramConfig()).train()
    model.freeze()
    whole = batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        matrices(model(whole, cfg.loss, cfg.mask), cfg.loss).backward()
    work = flops.FlopCounter(model, cfg)
    assert work.flops([whole]) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert work.flops([whole]) == work.flops([whole.padded(32)])


@pytest.mark.parametrize("pool", ["tower", "mean"])
def test_useful_flops_of_whole_clips_are_those_that_torch_counts(pool):
    """But for 3%, of clips of one length; the patches of short segments are embedded, and left out after that."""
    reading = ["model.audio_patch=[8,224]", "model.audio_span=clip", f"model.audio_pool={pool}"]
    cfg = load(RunConfig, None, ["model.trainable_towers=audio", *reading])
    model = Model(TINY, cfg.model, SpectrogramConfig()).train()
    model.freeze()
    whole = batch(segments=8)
    whole.segment_rows = torch.full((8,), 224)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        matrices(model(whole, cfg.loss, cfg.mask), cfg.loss).backward()
    work = flops.FlopCounter(model, cfg)
    assert work.flops([whole]) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert work.flops([whole]) == work.flops([whole.padded(32)])


@pytest.mark.parametrize("head", ["global_local", "local_local", "captioner"])
def test_useful_flops_of_a_head(head, monkeypatch):
    """Without padding and without what is computed again; torch's counter sees no more."""
    monkeypatch.setattr(fusion, "checkpoint", lambda run, *args, use_reentrant, **kwargs: run(*args, **kwargs))
    term = "caption" if head == "captioner" else "tm"
    words = [f"model.head={head}", "model.head_layers=2", f"loss={{at: 0, av: 0, aa: 0, {term}: 1}}"]
    cfg = load(RunConfig, None, words)
    model = Model(TINY, cfg.model, SpectrogramConfig()).train()
    model.freeze()
    whole = batch(segments=8, frames=8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = model(whole, cfg.loss, cfg.mask)
        scores = next((features[name] for name in ("scores", "nll") if name in features), None)
        (features["text"] @ features["media"].T if scores is None else scores).exp().sum().backward()
    assert flops.FlopCounter(model, cfg).flops([whole]) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.fixture(scope="module")
def traffic(sample_shards, tmp_path_factory):
    """For each case (ZeRO stage, micro-batches, words) bytes of a step, of its losses, the last row; then audio_space."""
    folder = tmp_path_factory.mktemp("traffic")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    words = [
        "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={folder}/tiny.json", "train.precision=fp32",
        f"data.train=[{sample_shards}/speech_fr/train, {sample_shards}/sounds/train]", "train.batch_size=12",
        f"train.max_steps={STEPS}", "train.log_every=1", "data.decode_threads=1", "track.wandb=off",
    ]  # fmt: skip
    runs = []
    for i, (stage, micros, more) in enumerate(CASES):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        (folder / f"{i}.json").write_text(json.dumps({"zero_optimization": zero}))
        more = [word.format(folder=folder) for word in more]
        run = [*words, f"run_dir={folder / str(i)}", f"train.gradient_accumulation_steps={micros}", *more]
        runs.append([run, str(folder / f"{i}.json")])
    done = ranks(2, "tests/helpers/traffic.py", folder / "out.json", json.dumps(runs))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


TUNED = [
    "eval.task=retrieval",
    "loss.at=0",
    "loss.av=0",
    "loss.aa=0",
    "loss.tm=1",
    "model.head_layers=2",
    "model.trainable_towers=text+vision+audio",
]
CAPTIONED = ["eval.task=captioning", *TUNED[1:4], "loss.caption=1", "model.head=captioner"]
CAPTIONED += ["model.head_layers=2", "model.trainable_towers=text+vision+audio"]
CASES = [
    (0, 1, []),
    (1, 1, ["train.precision=bf16", "loss.tv=1", "loss.exclude_same_group=false"]),
    (2, 2, ["loss.aa=0", "train.negatives=micro"]),
    (1, 16, ["train.precision=bf16", "train.batch_size=32", "train.negatives=micro"]),  # added up in fp32
    (3, 1, []),
    (3, 3, ["init_from=[{folder}/0]"]),  # the audio tower alone trains
    (1, 2, [*TUNED, "model.head=global_local"]),
    (2, 1, [*TUNED, "model.head=local_local", "loss.exclude_same_group=false"]),
    (3, 1, [*TUNED, "model.head=local_local", "model.modalities=v", "model.trainable_towers=text+vision"]),
    (1, 1, CAPTIONED),
    (3, 2, CAPTIONED),
]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"ZeRO-{CASES[i][0]}, {CASES[i][1]} micro-batches")
def test_comm_bytes_are_those_that_pass_through_the_collectives(traffic, case):
    counted, of_losses, row = traffic[0][case]
    known = {"rel": 0.03} if CASES[case][:2] == (3, 3) else {"abs": 200}  # norms, agreements, this row; padding
    assert counted == pytest.approx(row["comm_bytes"], **known)
    cfg = load(RunConfig, ROOT / "configs/pretrain/sample.yaml", [w for w in CASES[case][2] if w.startswith("loss.")])
    scored = "model.head=local_local" in CASES[case][2]
    backward = 4 * 12 * 12 if scored else 0  # of the scores; those of other terms are in no collective
    clips = 32 if "train.batch_size=32" in CASES[case][2] else 12
    assert of_losses == bytes_sent(cfg.loss, clips // 2, clips, TINY["embed_dim"], scored) - backward


def test_alignment_and_uniformity_of_two_ranks_against_pairs_one_by_one(traffic):
    squares, kernels = [], []
    for rank in range(2):
        features, parts = made_up(rank)
        _, text, _, heard = (torch.cat(part) for part in zip(*parts, strict=True))
        audio, captions = (features[name].double() for name in ("audio", "text"))
        squares += [float((audio[i] - captions[i]).square().sum()) for i in range(6) if heard[i] and text[i]]
        pairs = itertools.combinations(audio[heard], 2)
        kernels += [math.exp(-2 * float((a - b).square().sum())) for a, b in pairs]
    assert 0 < len(squares) < 12 and 0 < len(kernels) < 30
    assert traffic[1]["alignment"] == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert traffic[1]["uniformity"] == pytest.approx(math.log(sum(kernels) / len(kernels)), rel=1e-5)


def test_without_pairs_there_is_no_alignment_and_no_uniformity():
    features, labels = made_up(0)
    silent = [part._replace(has_audio=torch.zeros(3, dtype=torch.bool)) for part in labels]
    assert audio_space(features, silent) == {}


class Engine:
    """The part of DeepSpeed's engine that a row is made from; of its two groups one does not learn."""

    def __init__(self, module):
        self.module = module
        self.optimizer = SimpleNamespace(param_groups=[{"lr_scale": 0.0}, {"lr_scale": 0.5}])

    def get_global_grad_norm(self):
        return 2.5


@pytest.mark.parametrize("world", [1, 2])
def test_rows_of_an_interval(world, monkeypatch):
    """Shares are of each step, rates of the interval; the loss is the given one. All ranks give the same here."""
    monkeypatch.setattr(collectives, "world_size", lambda: world)
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda x: world * x)
    cfg = load(RunConfig, None, [f"train.batch_size={5 * world}"])
    model = Model(TINY, cfg.model, SpectrogramConfig())
    ds = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    meter = Meter(cfg, RunSetup(torch.device("cpu"), [], ds, None, model, "", None))
    features = {name: F.normalize(torch.randn(5, 8), dim=-1) for name in ("audio", "text", "masked")}
    run = Engine(model)
    for loss, silent in ((3.0, 0), (2.0, 2)):
        losses = {"aa": torch.tensor(loss / 2), "loss": torch.tensor(loss)}
        engine.set_learning_rate(run, loss / 100)
        meter.add(losses, features, [batch(3, silent=silent), batch(2)], run)
    first, last = meter.rows(12, run)
    assert (first["step"], last["step"], last["samples"]) == (11, 12, 60 * world)
    assert (first["lr"], last["lr"]) == (0.03, 0.02)
    assert (first["loss"], last["loss"], last["loss/aa"], last["grad_norm"]) == (3.0, 2.0, 1.0, 2.5)
    assert (first["no_audio_fraction"], last["no_audio_fraction"]) == (0.0, pytest.approx(0.4))
    assert last["masked_fraction"] == pytest.approx(50 / 200)
    work = flops.FlopCounter(model, cfg).flops([batch(3), batch(2)])
    assert last["tflops"] * 1e12 / last["clips_per_s"] == pytest.approx(work / 5 / world, rel=1e-6)  # FLOPs of a clip
    assert "clips_per_s" not in first and "mfu" not in last and meter.pending == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_measured_matrix_rate_of_a_gpu_is_plausible():
    assert 5e12 < flops.matrix_rate(torch.device("cuda")) < 5e15
