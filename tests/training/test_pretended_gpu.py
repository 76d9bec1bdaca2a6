"""Every path that a GPU takes, on a pretended one (helpers/pretended_gpu.py): no tensor on the wrong device, waits for the device
at the listed places alone, and the losses of the CPU. What only a GPU can show, its speed and rounding, is in e2e/test_gpu.py."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from media_models import SOUNDS, STILLS
from pretended_gpu import CPU, CUDA, PACKAGES, Engine, Mismatch, PretendedGPU, move, values
from torch.utils._pytree import tree_flatten

from clip4vla import CLIP4VLA
from clip4vla.config import ModelConfig, RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.data.loader import open_folders
from clip4vla.evaluation import runner
from clip4vla.models import fusion
from clip4vla.models.model import Model
from clip4vla.training import meter, train_step
from clip4vla.training.run_setup import build_model, train_loader
from data_prep import embed_shards

CLIP = {  # an even number of heads in towers and heads, as every CLIP has: nn.MultiheadAttention's native path is of those alone
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PICTURES = "SHARDS/pictures/train"
NONE = ["loss.at=0", "loss.av=0", "loss.aa=0"]
TUNE = [
    *NONE,
    "model.trainable_towers=text+vision+audio",
    "model.head_layers=2",
    "model.head_dropout=0",
    "eval.task=retrieval",
]
RETRIEVE = [*TUNE, "loss.tm=1"]
WRITE = [*TUNE, "loss.caption=1", "model.head=captioner", "eval.task=captioning", "decode.max_new_tokens=4"]
LABEL = [*TUNE, "loss.label=1", "model.head=classifier", "model.labels=[a, b]", "model.trainable_towers=vision+audio",
         "eval.task=classification", "classify.method=classifier"]  # fmt: skip
MIX = [*LABEL, "augment.mix=0.5", "augment.time_shift=9", "model.modalities=a", "model.trainable_towers=audio"]


@pytest.fixture(scope="module")
def config(sample_shards, tmp_path_factory):
    """Make a run's settings of words."""
    folder = tmp_path_factory.mktemp("pretended")
    (folder / "clip.json").write_text(json.dumps(CLIP))

    def make(*words):
        speech, sounds = (f"{sample_shards}/{name}" for name in ("speech_fr", "sounds"))
        own = [f"model.clip={folder}/clip.json", f"run_dir={folder}/run", "init_from=[]", "data.decode_threads=1",
               f"data.train={{{speech}/train: 0.5, {sounds}/train: 0.5}}", f"data.val=[{speech}/val, {sounds}/val]",
               "train.batch_size=12", "eval.batch_size=8", "data.languages=[en]"]  # fmt: skip
        return load(
            RunConfig,
            "configs/pretrain/sample.yaml",
            [*own, *(word.replace("SHARDS", str(sample_shards)) for word in words)],
        )

    return make


def built(cfg):
    """A model with the same weights at each call, and the folders of data.train."""
    folders = open_folders(cfg.data.train, "data.train", cfg.data)
    torch.manual_seed(0)
    return build_model(cfg, folders[0].fingerprint, None)[0], folders


def read(cfg, folders, device, vectors=False, padded=False):
    """The micro-batches of the first step."""
    loader = train_loader(cfg, folders, None, device)
    micros = [loader.batch(0, piece) for piece in range(cfg.train.gradient_accumulation_steps)]
    for i, micro in enumerate(micros):
        if vectors:  # as embed.py's would come
            torch.manual_seed(i)
            text, frames = torch.randn(len(micro), 128), torch.randn(len(micro.frame_clip), 128)
            micro.text_vectors, micro.frame_vectors = (F.normalize(x, dim=-1).half() for x in (text, frames))
            micro.frames, micro.tokens = micro.frames[:0], micro.tokens[:, :0]
        micros[i] = micro.padded(cfg.model.max_tokens) if padded else micro
    return [micro.pin() for micro in micros] if device == CUDA else micros


def stepped(cfg, model, folders, device, dtype=None, **kind):
    """(losses, gradients) of one step of a model, on the CPU, or in a block of PretendedGPU on that."""
    for tower in (model.text, model.vision, model.audio.trunk):
        tower.transformer.grad_checkpointing = cfg.train.activation_checkpointing
    model = move(model, dtype) if device == CUDA else model.to(dtype)
    losses, features = train_step.step(Engine(model, device), read(cfg, folders, device, **kind), cfg)
    meter._not_finite(features)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return tuple({name: values(x).detach().float() for name, x in some.items()} for some in (losses, trained))


STEPS = {
    "bf16": ([], {"dtype": torch.bfloat16}),
    "fp16": (["train.batch_size=4"], {"dtype": torch.float16}),  # of which CPUs are slow
    "vectors": ([], {"vectors": True, "dtype": torch.bfloat16}),
    "vectors, padded": ([], {"vectors": True, "padded": True}),
    "padded": ([], {"padded": True}),
    "accumulated, recomputed": (
        ["train.gradient_accumulation_steps=3", "train.activation_checkpointing=true"], {"vectors": True},
    ),
    "official": (["preset=official"], {}),
    "temperature": (["model.learn_temperature=true", "model.trainable_towers=text+vision+audio"], {}),
    "clip": ([*NONE, "loss.tv=1", "model.trainable_towers=text+vision"], {}),
    "whole clips": (["model.audio_span=clip", "model.audio_pool=mean"], {}),
    "no sound": (["loss.tv=1", f"data.train={PICTURES}"], {}),
    "no sound, whole clips": ([*RETRIEVE, "model.audio_span=clip", f"data.train={PICTURES}"], {}),
    "global_global": ([*RETRIEVE, "model.head=global_global"], {}),
    "global_local": ([*RETRIEVE, "model.head=global_local"], {}),
    "local_local": ([*RETRIEVE, "model.head=local_local"], {}),
    "local_local, eos": ([*RETRIEVE, "model.head=local_local", "model.text_tokens=eos", "model.audio_span=clip"], {}),
    "captioner": (WRITE, {}),
    "classifier": (LABEL, {}),
    "classifier of mixed sounds": (MIX, {}),
}  # fmt: skip


def same(ours, wanted):
    """All tensors of two trees are the same, but for what other kernels round."""
    pairs = list(zip(leaves(ours), leaves(wanted), strict=True))
    assert pairs
    for mine, theirs in pairs:
        if isinstance(theirs, torch.Tensor | float):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert mine == theirs


def leaves(tree):
    flat = tree_flatten(vars(tree) if dataclasses.is_dataclass(tree) else tree)[0]
    return [values(x) for x in flat]


@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_the_cpus(config, case):
    words, kind = STEPS[case]
    cfg = config(*words)
    wanted, gradients = stepped(cfg, *built(cfg), CPU, **kind)
    again = built(cfg)
    with PretendedGPU() as gpu:
        ours, our_gradients = stepped(cfg, *again, CUDA, **kind)
    exact = "dtype" not in kind
    for name, value in wanted.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-5 if exact else 2e-2), name
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= (1e-4 if exact else 0.2) * gradient.norm() + 1e-5, name
    assert not gpu.waits


# the places at which an evaluation waits for the device: what it takes to the CPU, and whether all captions are written
ZERO_SHOT = ["evaluation/zero_shot.py _where", "evaluation/zero_shot.py embed"]
RETRIEVAL = [f"evaluation/text_video.py {name}" for name in ("_captions", "_embed", "_rows")]
VECTORS, SCORES = (RETRIEVAL + [f"evaluation/text_video.py {name}"] for name in ("_compare", "_scores"))
NEAREST = ["evaluation/visual_neighbors.py _nearest"]
SOUNDS_OF_OTHERS = [*NEAREST, "evaluation/visual_neighbors.py _sounds"]
WRITING = ["evaluation/captioning.py _written", "models/generation.py _everywhere"]
FEATURES = [
    f"evaluation/{name}"
    for name in ("features.py _features_sha256", "features.py _computed", "classification.py _by_names")
]
EVALUATIONS = {
    "zero-shot": ([], "val", ZERO_SHOT),
    "zero-shot, pictures alone": ([], "pictures", ZERO_SHOT),
    "whole clips, pictures alone": (["model.audio_span=clip", "model.audio_pool=mean"], "pictures", ZERO_SHOT),
    "global_global": ([*RETRIEVE, "model.head=global_global"], "val", VECTORS),
    "global_local": ([*RETRIEVE, "model.head=global_local"], "pictures", VECTORS + SOUNDS_OF_OTHERS),
    "local_local": ([*RETRIEVE, "model.head=local_local"], "val", SCORES),
    "local_local, eos": ([*RETRIEVE, "model.head=local_local", "model.text_tokens=eos"], "pictures", SCORES + SOUNDS_OF_OTHERS),
    "beam": ([*WRITE, "decode.num_beams=2"], "val", WRITING),
    "greedy": ([*WRITE, "decode.method=greedy"], "val", WRITING),
    "nucleus": ([*WRITE, "decode.method=nucleus", "decode.no_repeat_ngram_size=2"], "pictures", WRITING),
    "nearest": ([*WRITE, "decode.method=nearest"], "val", ["evaluation/captioning.py _nearest", *NEAREST]),
    "classifier": (LABEL, "val", ["evaluation/classification.py _by_head"]),
    "features": (["eval.task=classification", "classify.method=zero_shot"], "val", FEATURES),
}  # fmt: skip


@pytest.mark.parametrize("case", EVALUATIONS)
def test_an_evaluation_is_the_cpus(config, sample_shards, case):
    words, which, waits = EVALUATIONS[case]
    cfg = config(*words, "eval.missing_audio=nearest")
    sources = {f"{sample_shards}/pictures/val": 1.0} if which == "pictures" else cfg.data.val
    wanted = runner.run_inference(built(cfg)[0].eval(), cfg, sources, "data.val")[1]
    model, cfg.run_dir = built(cfg)[0].eval(), f"{cfg.run_dir}-gpu"  # features are kept
    with PretendedGPU() as gpu:
        ours = runner.run_inference(move(model), cfg, sources, "data.val")[1]
    same(ours, wanted)
    assert sorted(gpu.waits) == sorted(waits), dict(gpu.waits)


@pytest.mark.parametrize("head", ["global_global", "local_local", "captioner", "classifier"])
def test_the_api_is_the_cpus(head):
    torch.manual_seed(0)
    cfg = ModelConfig(clip="ViT-B-32", head=head, head_layers=2, max_tokens=24, labels=["a", "b"])
    model = CLIP4VLA(CLIP, cfg, SpectrogramConfig()).eval()

    def use(model):
        media = [(STILLS[0], SOUNDS[0]), SOUNDS[1], (STILLS[1], None)]
        yield model.encode_text(["a dog", "a cat"])
        yield model.encode_audio(SOUNDS[:2])
        yield model.encode_video(STILLS[:2])
        yield model.classify(STILLS[:2], ["dog", "cat"])
        yield model.similarity(["a dog", "a cat"], media)
        if head == "captioner":
            yield model.caption(media, max_new_tokens=4, num_beams=2)
        if head == "classifier":
            yield model.classify(media)

    wanted = list(use(model))
    with PretendedGPU() as gpu:
        model = move(model)
        ours = list(use(model))
    same(ours, wanted)
    writes = ["api.py CLIP4VLA.caption", "models/generation.py _everywhere"] if head == "captioner" else []
    assert sorted(gpu.waits) == sorted(["api.py CLIP4VLA.encode", *writes]), dict(gpu.waits)


def test_embedding_is_the_cpus(config, tmp_path):
    cfg = config()
    model, folders = built(cfg)
    with PretendedGPU() as gpu:
        model = move(model.eval())
        micro = read(cfg, folders, CUDA)[0]
        with torch.no_grad():
            loader = embed_shards.make_loader(cfg, folders[0], CUDA, tmp_path / "corrupt.jsonl")
            embed_shards.vectors(model, loader, micro.to(CUDA))
    assert list(gpu.waits) == ["embed_shards.py vectors"]


@torch.no_grad()
def test_no_caption_and_no_clip_are_scored_as_none():
    """As retrieval without any caption does; nn.MultiheadAttention's native path refuses them."""
    torch.manual_seed(0)
    head = Model(CLIP, ModelConfig(clip="ViT-B-32", head="local_local", head_layers=2), SpectrogramConfig()).head.eval()
    with PretendedGPU() as gpu:
        move(head)
        for captions, clips in ((0, 3), (2, 0), (0, 0), (2, 3)):
            words = fusion.pad_packed(
                fusion.TEXT, torch.randn(captions, 128, device=CUDA), torch.ones(captions).long(), 1
            )
            frames = fusion.pad_packed(fusion.VISION, torch.randn(clips, 128, device=CUDA), torch.ones(clips).long(), 1)
            assert head(words, [frames]).shape == (captions, clips)
    assert not gpu.waits


def test_what_cuda_refuses_is_refused_and_what_it_waits_for_is_noted():
    """The pretended GPU itself: each of these would be missed by a CPU."""
    attention = torch.nn.MultiheadAttention(4, 2, batch_first=True).eval()
    with PretendedGPU() as gpu, torch.no_grad():
        x, here = torch.arange(6.0, device=CUDA).view(2, 3), torch.ones(2, 3)
        for mixed in (lambda: x + here, lambda: torch.cat([x, here]), lambda: here[x.long()]):
            with pytest.raises(Mismatch):
                mixed()
        move(attention)
        none = torch.zeros(0, 3, 4, device=CUDA)
        with pytest.raises(RuntimeError, match="reshape"):
            attention(none, none, none)
        with pytest.raises(RuntimeError, match="batch of 0"):
            F.scaled_dot_product_attention(none, none, none)
        for waits in (
            lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 2], lambda: x.nonzero(), lambda: x.cpu(),
            lambda: x.tolist(), lambda: x.long().flatten().bincount(), lambda: torch.tensor([1], device=CUDA),
            lambda: here.to(CUDA), lambda: here.to(CUDA, non_blocking=True), lambda: x[torch.tensor([0])],
            lambda: x.long().flatten().repeat_interleave(x.long().flatten()), lambda: x.copy_(here),
        ):  # fmt: skip
            assert _waited(gpu, waits)
        for goes_on in (
            lambda: here.pin_memory().to(CUDA, non_blocking=True), lambda: x[:, 1:] * 2, lambda: x.__setitem__(0, 1.0),
            lambda: x.masked_fill(x > 2, 0), lambda: torch.full((3,), 2.0, device=CUDA), lambda: x[x.long()[0] % 2],
        ):  # fmt: skip
            assert not _waited(gpu, goes_on)


def _waited(gpu, work):
    """Whether the host waits for the device; called as a function of the package."""
    gpu.waits.clear()
    code = compile("def asks(work):\n    work()\n", f"{PACKAGES[0]}asks.py", "exec")
    exec(code, names := {})
    names["asks"](work)
    return "asks.py asks" in gpu.waits
