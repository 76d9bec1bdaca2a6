"""text_video.py and its parts on real clips: ranks, silent clips, what is left out, the manifest, the best checkpoint."""

import hashlib
import json
import shutil

import indexes
import numpy as np
import pytest
import torch
from running import evaluation, ranks, run
from stand_ins import OneBatch, Towers, looks

from clip4vla.checkpoints import best as selection
from clip4vla.checkpoints.lookup import chosen_checkpoint, expired
from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.evaluation import runner, text_video
from clip4vla.models.model import TEXTS, Model
from clip4vla.towers.text import token_mask

SCRIPT = "launch/finetune_retrieval.py"

HEADS = ("global_global", "global_local", "local_local")


@pytest.fixture(scope="module")
def tuned(tuning, tmp_path_factory):
    """{head: words that evaluate a run with it}, after two steps."""
    found = {}
    for head in HEADS:
        folder = tmp_path_factory.mktemp(head)
        more = [
            *tuning,
            f"model.head={head}",
            f"run_dir={folder}",
            "train.max_steps=2",
            "eval.bootstrap=20",
            "eval.captions=all",
        ]
        assert ranks(1, SCRIPT, *more).returncode == 0
        found[head] = (folder, more)
    return found


def evaluated(tuned, head, *more, n=1):
    """(metrics, manifest) of an evaluation."""
    folder, words = tuned[head]
    done = ranks(n, "launch/evaluate.py", *words, *more)
    assert done.returncode == 0, done.stderr
    made = evaluation(folder, done.stdout)
    return tuple(json.loads((made / f"{name}.json").read_text()) for name in ("metrics", "manifest"))


@pytest.mark.parametrize("head", HEADS)
def test_two_ranks_give_the_numbers_of_one(tuned, sample_shards, head):
    """No clip of data.train among them: it would tie with the silent clips that its sound is lent to, but for rounding."""
    test = f"data.test=[{sample_shards}/speech_es/train, {sample_shards}/pictures/test]"
    one, two = (evaluated(tuned, head, test, n=n) for n in (1, 2))
    assert one == two
    metrics, manifest = one
    assert set(metrics) == {f"{way}{kind}" for way in ("text_to_video", "video_to_text") for kind in ("", "/v", "/a")}
    row = metrics["text_to_video"]
    assert row["n_queries"] > row["n_gallery"] == 20 and row["ci"]["R@5"][0] <= row["R@5"] <= row["ci"]["R@5"][1]
    found = {
        json.dumps([metrics[f"{way}{kind}"] for way in ("text_to_video", "video_to_text")]) for kind in ("", "/v", "/a")
    }
    assert len(found) == 3  # not the same thing three times


def test_silent_clips_take_the_sound_of_the_training_clip_that_looks_most_like_them(tuned, sample_shards):
    folder, _ = tuned["global_global"]
    both = f"data.test=[{sample_shards}/speech_fr/val, {sample_shards}/pictures/test, {sample_shards}/pictures/val]"
    found = {
        how: evaluated(tuned, "global_global", both, f"eval.missing_audio={how}")
        for how in ("nearest", "zero", "exclude")
    }
    silent = found["nearest"][1]["silent"]
    model = Model.from_checkpoint(folder / "checkpoints/step-00000002")
    train, heard = looks(sample_shards / "speech_fr/train", model)
    wanted = {}
    for split in ("test", "val"):
        for name, look in looks(sample_shards / f"pictures/{split}", model)[0].items():
            wanted[name] = max(heard, key=lambda donor, look=look: float(train[donor] @ look))
    assert silent["donors"] == wanted and silent["clips"] == silent["filled"] == len(wanted) == 4
    assert found["zero"][1]["silent"]["filled"] == 0 and found["zero"][1]["n_ids"] == found["nearest"][1]["n_ids"]
    left_out = found["exclude"][1]["excluded"]["silent"]
    assert sorted(left_out) == sorted(wanted)
    sizes = {how: metrics["text_to_video"]["n_gallery"] for how, (metrics, _) in found.items()}
    assert sizes == {"nearest": 6, "zero": 6, "exclude": 2}
    assert found["nearest"][0]["text_to_video/v"] == found["zero"][0]["text_to_video/v"]
    assert found["nearest"][0]["video_to_text/a"] != found["zero"][0]["video_to_text/a"]


def test_without_a_training_clip_that_could_give_its_sound_it_says_so(tuned, sample_shards):
    _, words = tuned["global_global"]
    mute = [f"data.{part}=[{sample_shards}/pictures/{split}]" for part, split in (("train", "train"), ("test", "test"))]
    done = run("launch/evaluate.py", *words, *mute)
    assert done.returncode == 2 and "no clip of data.train has both frames and sound" in done.stderr


def test_one_medium_alone_and_all_captions_or_the_first(tuned, sample_shards):
    test = f"data.test=[{sample_shards}/speech_fr/train]"
    for kind in "va":
        alone, manifest = evaluated(
            tuned, "local_local", test, f"model.modalities={kind}", "model.trainable_towers=text"
        )
        assert set(alone) == {"text_to_video", "video_to_text"} and manifest["settings"]["model"]["modalities"] == kind
        assert alone == evaluated_before(tuned, test, kind)
    first, manifest = evaluated(tuned, "local_local", test, "eval.captions=first")
    assert first["text_to_video"]["n_queries"] == first["text_to_video"]["n_gallery"] == 18
    assert manifest["protocol"].startswith(
        "the first caption of a clip is a query of its own (18 for 18 clips, 1 each)"
    )


def evaluated_before(tuned, test, kind):
    """What the fused run says of one medium."""
    metrics, _ = evaluated(tuned, "local_local", test)
    return {way: metrics[f"{way}/{kind}"] for way in ("text_to_video", "video_to_text")}


def test_the_manifest_names_what_was_used(tuned, sample_shards, tmp_path):
    folder, words = tuned["global_local"]
    shards = tmp_path / "test"
    shutil.copytree(sample_shards / "speech_fr/train", shards)
    index = indexes.read(shards)
    (tar, *_) = sorted(shards.glob("*.tar"))
    with tar.open("r+b") as stream:  # one sample's spectrogram is corrupt
        key, members = index["shards"][0]["entries"][3]
        offset, size, _ = members["fbank.jpg"]
        stream.seek(offset + size // 2)
        stream.write(b"damage")
    _, manifest = evaluated(tuned, "global_local", f"data.test={shards}", "data.max_corrupt_fraction=1")
    assert manifest["missing"] == [f"{index['source']}/{key}"] and manifest["n_ids"] == len(manifest["ids"]) == 17
    assert manifest["sources"][str(shards)]["shards_sha256"][tar.name] == index["shards"][0]["sha256"]
    weights = (folder / "checkpoints/step-00000002/model.safetensors").read_bytes()
    assert (
        manifest["checkpoint"]["sha256"] == hashlib.sha256(weights).hexdigest() and manifest["checkpoint"]["step"] == 2
    )
    assert load(RunConfig, None, []).eval.missing_audio == manifest["settings"]["eval"]["missing_audio"]


@torch.no_grad()
@pytest.mark.parametrize("head", ["global_local", "local_local"])
def test_captions_are_read_a_few_at_a_time(head):
    """Their sentences, and for the head that reads them their words, are those of one pass."""
    model = Towers()
    model.cfg.head, model.cfg.head_layers = head, 1
    model.init_head()
    loader = OneBatch(TEXTS, 0, 2)
    texts = [text for meta in loader.meta for text in meta["captions"]]
    found = text_video._captions(model, loader, dict(enumerate(loader.meta)), None)
    assert model.passes == [TEXTS, 2] and list(found) == [(0, j) for j in range(TEXTS)] + [(2, 0), (2, 1)]
    tokens = loader.tokenize(texts)
    sentence, words = model.encode_tokens(tokens)
    for row, (one, read) in enumerate(found.values()):
        torch.testing.assert_close(one, sentence[row], atol=1e-5, rtol=0)
        there = token_mask(model.text, tokens)[row] if head == "local_local" else slice(0)
        torch.testing.assert_close(read, words[row][there], atol=1e-5, rtol=0)


def test_the_best_checkpoint_on_val_is_kept_and_evaluated(tuning, sample_shards, tmp_path):
    """Whatever keep says; data.test takes no part in the choice."""
    select = [
        "eval.best_metric=text_to_video/MeanR",
        "eval.every_steps=1",
        "train.keep_last=1",
        "train.save_every=100",
        "train.lr=3e-3",
    ]
    words = [*tuning, *select, f"run_dir={tmp_path}", f"data.val={sample_shards}/speech_fr/train", "eval.bootstrap=0"]
    assert ranks(2, SCRIPT, *words).returncode == 0
    mean = {
        f.parent.name[-1]: json.loads(f.read_text())["text_to_video"]["MeanR"]
        for f in tmp_path.glob("eval/val-*/m*s.json")
    }
    assert set(mean) == set("1234")
    best = min(sorted(mean), key=mean.get)
    assert {p.name[-1] for p in (tmp_path / "checkpoints").glob("step-*")} == {best, "4"}
    done = run("launch/evaluate.py", *words, f"data.test={sample_shards}/pictures/test")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((evaluation(tmp_path, done.stdout) / "manifest.json").read_text())
    assert manifest["checkpoint"]["step"] == int(best)


def test_selection(tmp_path):
    cfg = load(
        RunConfig,
        None,
        [f"run_dir={tmp_path}", "eval.best_metric=text_to_video/R@1", "train.keep_last=1", "eval.every_steps=2"],
    )
    names = [f"step-{i:08d}" for i in (2, 4, 6, 8)]
    for name, recall in zip(names, (3.0, 9.0, 9.0, None), strict=True):
        folder = tmp_path / "eval" / name.replace("step", "val")
        folder.mkdir(parents=True)
        if recall is not None:  # the last one is still being ranked
            (folder / "metrics.json").write_text(json.dumps({"text_to_video": {"R@1": recall, "p_value": None}}))
    assert selection.best(cfg) == names[1]  # of equal ones the first
    assert expired([*names, "step-00000009"], cfg) == [names[0], names[2]]
    (tmp_path / "checkpoints" / names[1]).mkdir(parents=True)
    assert chosen_checkpoint(cfg).name == names[1]
    cfg.eval.best_metric = ""
    assert expired(names, cfg) == names[:3]
    for wrong in ("R@1", "text_to_audio/R@1", "text_to_video/p"):
        with pytest.raises(UserError, match="no such number"):
            selection.value({"text_to_video": {"R@1": 1.0, "p_value": None}}, wrong)


@pytest.mark.parametrize(
    "head, modalities", [("global_local", "av"), ("local_local", "av"), ("local_local", "v"), ("global_global", "a")]
)
def test_the_page_shows_what_the_metrics_count(tuned, sample_shards, head, modalities):
    """Of all queries; a silent clip says whose sound it was given, and a medium that takes no part is not shown."""
    folder, (config, *more) = tuned[head]
    test = f"data.test=[{sample_shards}/speech_fr/train, {sample_shards}/pictures/test]"
    cfg = load(RunConfig, config, [*more, test, f"model.modalities={modalities}", "eval.report_queries=1000"])
    model = Model.from_checkpoint(folder / "checkpoints/step-00000002")
    model.cfg = cfg.model
    loader, found = runner.run_inference(model, cfg, cfg.data.test, "data.test")
    metrics = text_video.compute_metrics(found, cfg)[cfg.model.audio_type]
    shown, queries = text_video.examples(found, loader, cfg)
    assert len(queries) == len(found.captions) == metrics["text_to_video"]["n_queries"] > 20
    names, groups = ([clip[key] for clip in found.clips.values()] for key in ("id", "group"))
    compared = found.compared
    assert list(compared) == list(dict.fromkeys([modalities, *modalities]))
    scores = {
        k: c.query if c.gallery.ndim == 1 else c.query.double() @ c.gallery.double().T for k, c in compared.items()
    }
    for row, (query, (clip, caption)) in enumerate(zip(queries, found.captions, strict=True)):
        assert (query.direction, query.text) == ("text_to_video", found.clips[clip]["captions"][caption])
        main = [hit.scores[modalities] for hit in query.hits]
        assert main == sorted(main, reverse=True) and query.rank == query.ranks[modalities]
        assert any(hit.right for hit in query.hits)
        assert main[:5] == pytest.approx(scores[modalities][row].topk(5).values.tolist())
        for hit in query.hits:
            column = names.index(shown[hit.exhibit].title.split(" (")[0])
            assert hit.right == (groups[column] == found.clips[clip]["group"])
            assert hit.scores == pytest.approx({k: float(s[row, column]) for k, s in scores.items()})
    for kind in compared:
        ranks = np.array([query.ranks[kind] for query in queries])
        counted = metrics["text_to_video" + f"/{kind}" * (kind != modalities)]
        assert (100 * np.mean(ranks <= 1), ranks.mean()) == pytest.approx((counted["R@1"], counted["MeanR"]))
    silent = {clip["id"] for clip in found.clips.values() if not clip["has_audio"]}
    assert found.filled.keys() == (silent if "a" in modalities else set()) and len(silent) == 2
    for exhibit in shown:
        name = exhibit.title.split(" (")[0]
        donor = found.filled.get(name)
        assert exhibit.title == (f"{name} (silent: sound of {donor})" if donor else name)
        assert (exhibit.picture is not None) == ("v" in modalities)
        heard = "a" in modalities and name not in silent
        assert (exhibit.spectrogram is not None) == (exhibit.audio is not None) == heard
