"""captioning.py, launch/finetune_captioning.py: scores as by pycocoevalcap, the loss, ranks, resume, a sample learnt by heart."""

import json
import runpy
import shutil
import tarfile

import numpy as np
import pytest
import torch
from forks import ROOT
from running import TINY, evaluation, ranks, trace
from stand_ins import looks

from clip4vla.config import LossConfig, MaskConfig, ModelConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.data.batch import Batch
from clip4vla.data.loader import keep_languages
from clip4vla.evaluation import captioning
from clip4vla.models.model import Model
from clip4vla.towers.tokenizer import tokenizer

SCRIPT = "launch/finetune_captioning.py"
SAID = {"a": "A black cat sits.", "b": "a dog barks loudly at the moon", "c": "Rain!"}
MEANT = {
    "a": ["A black cat is sitting on a mat.", "The cat sits"],
    "b": ["A dog barks.", "Dogs bark loudly at night, don't they?"],
    "c": ["It's raining", "rain falls - on a roof"],
}


@pytest.fixture(scope="module")
def meteor():
    """METEOR's one Java process for all that scores in this file: it takes seven CPU seconds to start."""
    from pycocoevalcap import eval as coco
    from pycocoevalcap.meteor import meteor

    one = meteor.Meteor()
    with pytest.MonkeyPatch.context() as patch:
        for module in (coco, meteor):
            patch.setattr(module, "Meteor", lambda: one)
        yield


def by_hand(folder):
    """{metric: score} of results.json and references.json by pycocoevalcap's own evaluation, without SPICE, which downloads."""
    import pycocoevalcap.eval as coco
    from pycocotools.coco import COCO

    class Nothing:
        def compute_score(self, references, captions):
            return 0.0, [{}] * len(captions)

        def method(self):
            return "none"

    truth = COCO(str(folder / "references.json"))
    judge = coco.COCOEvalCap(truth, truth.loadRes(str(folder / "results.json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "Spice", Nothing)
        judge.evaluate()
    names = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}
    return {names.get(name, name): 100 * value for name, value in judge.eval.items() if name != "SPICE"}


def found(said, meant):
    clips = {i: {"id": name, "captions": meant[name], "group": name} for i, name in enumerate(said)}
    return captioning.CaptioningOutputs(clips, {i: (text, 0.0) for i, text in enumerate(said.values())}, [], {})


def test_scores_are_those_of_pycocoevalcap(meteor, tmp_path):
    nasty = SAID | {"d": "", "e": "snow | falls\nin the\r\nnight\u2028 now", "f": "!!", "g": "😀 Ünïcode"}
    wanted = MEANT | {"d": ["nothing"], "e": ["snow falls in the night now"], "f": ["a"], "g": ["ünïcode | smiles"]}
    written = found(nasty, wanted)
    cfg = load(captioning.RunConfig, None, ["eval.bootstrap=0", "model.head=captioner"])
    metrics = captioning.compute_metrics(written, cfg)["both"]["caption"]
    assert metrics["n_clips"] == 7 and metrics["n_references"] == 10 and "excluded" not in metrics
    captioning.write_results(tmp_path, found({name: " ".join(text.split()) for name, text in nasty.items()}, wanted))
    hand = by_hand(tmp_path)
    assert list(hand) == list(captioning.METRICS)
    assert {name: metrics[name] for name in hand} == pytest.approx(hand, rel=1e-12)
    assert written.scores["CIDEr"][4] > 0 == written.scores["CIDEr"][3]
    assert np.mean(written.scores["CIDEr"]) == pytest.approx(metrics["CIDEr"])


def test_captions_like_their_references_are_perfect(meteor):
    texts = {i: [f"a {word} sits on the {word} mat"] for i, word in enumerate(("cat", "dog", "bird"))}
    said = {i: t[0].upper() + ". |||" for i, t in texts.items()}  # three are METEOR's own separator
    totals, each = captioning.score(said, texts)
    assert [totals[name] for name in captioning.METRICS] == pytest.approx([100] * 6 + [1000])
    assert each["CIDEr"] == pytest.approx([1000] * 3)


@pytest.mark.parametrize("java", [True, False])
def test_the_first_words_of_a_text_count(java):
    texts = {0: ["a,"] * 2 + ["A black cat sits."], 1: ["a " * 5_000, "a," * 5_000]}  # one word, as spaces split it
    words = [[len(text.split(" ")) for text in some] for some in captioning.tokenise(texts, java).values()]
    assert words == [[1, 1, 4], [captioning.WORDS, captioning.WORDS]]


def test_long_captions_score_as_their_first_words(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    first = " ".join(f"w{i % 7}" for i in range(captioning.WORDS))
    said, meant = {0: first, 1: "a cat"}, {0: ["w3 w4 " + first], 1: ["the cat"]}
    long = {0: f"{first} {first}"}, {0: [f"w3 w4 {first} {first}"]}
    assert captioning.score(said | long[0], meant | long[1]) == captioning.score(said, meant)
    assert "the first 250 of each text" in captioning.protocol(found(SAID, MEANT), captioning.RunConfig())["protocol"]


def test_references_of_punctuation_give_a_cider_of_0(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    totals, each = captioning.score(SAID, {"a": ["!"], "b": ["...", "?"], "c": ["-"]})
    assert totals["CIDEr"] == 0 and each["CIDEr"] == [0, 0, 0] and totals["ROUGE-L"] == 0
    assert captioning.score({"a": "", "b": "!"}, {"a": ["!"], "b": ["?"]})[0]["CIDEr"] == 0


def test_intervals_draw_whole_groups():
    values, groups = np.array([1.0, 3.0, 10.0]), np.array([5, 5, 9])
    low, high = captioning.interval(values, groups, 4000, 0)
    assert (low, high) == (2.0, 10.0)  # only the first group, only the second
    assert captioning.interval(values, np.zeros(3, int), 100, 0) == pytest.approx([14 / 3, 14 / 3])
    many = np.random.default_rng(0).normal(size=400)
    low, high = captioning.interval(many, np.arange(400), 2000, 1)
    assert high - low == pytest.approx(2 * 1.96 * many.std() / 20, rel=0.1)


def test_captions_of_chosen_languages_alone():
    clip = {"id": "x", "captions": ["Un chat.", "A cat."], "caption_langs": ["fr", "en"]}
    assert keep_languages(clip, ["en"]) == {"id": "x", "captions": ["A cat."], "caption_langs": ["en"]}
    assert keep_languages(clip, []) is clip and keep_languages(clip, ["ca"])["captions"] == []


def batch_of(texts):
    """A batch of clips with a frame and a segment of noise each, and these captions; the last clip has none."""
    torch.manual_seed(0)
    clips = len(texts) + 1
    owners, yes = torch.arange(clips), torch.ones(clips, dtype=torch.bool)
    none, noise = (
        torch.zeros(clips, 224, dtype=torch.bool),
        torch.randint(0, 256, (clips, 4, 224, 224), dtype=torch.uint8),
    )
    return Batch(
        ids=[str(i) for i in range(clips)], captions=[*texts, ""], tokens=tokenizer("x.json", 12)([*texts, ""]),
        frames=noise[:, :3], frame_clip=owners, segments=noise[:, 3:], segment_clip=owners,
        segment_rows=torch.full((clips,), 224), hidden_rows=none, hidden_channels=none, audio_type=owners * 0, group=owners,
        has_text=owners < len(texts), has_frames=yes, has_audio=yes, meta=[{}] * clips,
    )  # fmt: skip


@pytest.mark.parametrize("smoothing, padded", [(0.0, False), (0.1, False), (0.0, True)])
def test_the_loss_is_that_of_each_word_alone(smoothing, padded):
    torch.manual_seed(1)
    model = Model(
        TINY, ModelConfig(head="captioner", head_layers=2, max_tokens=12, head_dropout=0.0), SpectrogramConfig()
    )
    batch = batch_of(["a cat", "a dog barks at the moon", "rain"])
    cfg = LossConfig(at=0, av=0, aa=0, caption=1, label_smoothing=smoothing, train_on_padding=padded)
    nll = model(batch, cfg, MaskConfig())["nll"]
    parts, wanted, words = model.media(batch), [], 0
    for clip, has_text in enumerate(batch.has_text.tolist()):
        one = [part.select(torch.tensor([clip])) for part in parts]
        tokens = batch.tokens[clip, : int(batch.tokens[clip].argmax()) + 1]
        total = torch.zeros(())
        for n in range(1, len(tokens) if has_text else 1):  # from scratch, a word at a time
            decoder = model.start_decoding(one, 1)
            for token in tokens[:n]:
                scores = decoder.step(token[None])[0]
            log = scores.log_softmax(0)
            total = total - (1 - smoothing) * log[tokens[n]] - smoothing * log.mean()
            words += 1
        wanted.append(total)
    if not padded:
        torch.testing.assert_close(nll, torch.stack(wanted), rtol=1e-5, atol=1e-5)
        assert int(model.caption_targets(batch, cfg)[1].sum()) == words
    else:  # what is behind a caption counts too, up to max_tokens, and is learnt to be token 0
        assert int(model.caption_targets(batch, cfg)[1].sum()) == 3 * 11
        assert nll[3] == 0 and (nll[:3] > torch.stack(wanted)[:3] + 8).all()
    nll.sum().backward()
    assert (
        model.text.token_embedding.weight.grad.abs().sum() > 0 and model.audio.trunk.conv1.weight.grad.abs().sum() > 0
    )


@pytest.fixture(scope="module")
def describing(headed, sample_shards):
    """Words of a tiny captioning run."""
    return [
        *headed, "loss={at: 0, av: 0, aa: 0, caption: 1}", "model.head=captioner",
        f"data.train={sample_shards}/speech_fr/train",
        "model.trainable_towers=text+vision+audio", "model.head_layers=2", "model.max_tokens=16", "eval.task=captioning",
        "train.max_steps=4", f"data.test=[{sample_shards}/speech_fr/train, {sample_shards}/pictures/test]", "data.languages=[en]",
    ]  # fmt: skip


def test_any_ranks_zero_stages_and_micro_batches_give_the_same_losses(describing, no_java, zero3, tmp_path):
    traces = []
    held_out = ["eval.every_steps=2", "eval.best_metric=caption/CIDEr", "decode.num_beams=2", "eval.batch_size=2"]
    for n, more in (
        (1, []),
        (2, ["train.gradient_accumulation_steps=3"]),
        (2, [*held_out, "--deepspeed_config", zero3]),
    ):
        run_dir = tmp_path / f"{len(traces)}"
        done = ranks(n, SCRIPT, *describing, f"run_dir={run_dir}", "model.head_dropout=0", *more, env=no_java)
        assert done.returncode == 0, done.stderr
        traces.append(trace(run_dir))
    for other in traces[1:]:
        for step, losses in traces[0].items():
            assert other[step] == pytest.approx(losses, rel=1e-5)
    norms = [[json.loads(line)["grad_norm"] for line in (tmp_path / f"{i}/metrics.jsonl").open()] for i in range(3)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[2] == pytest.approx(norms[0], rel=1e-4)
    assert len(traces[0]) == 4 and traces[0][4] < traces[0][1]
    metrics = json.loads((tmp_path / "2/eval/val-00000004/metrics.json").read_text())
    assert set(captioning.METRICS) - set(metrics["caption"]) == {"METEOR"}
    shutil.rmtree(tmp_path / "2/eval/val-00000004")  # as if it had been killed there
    again = ranks(n, SCRIPT, *describing, f"run_dir={run_dir}", "model.head_dropout=0", *more, env=no_java)
    assert again.returncode == 0 and "4 done of 4" in again.stdout, again.stderr
    assert json.loads((tmp_path / "2/eval/val-00000004/metrics.json").read_text()) == metrics


def test_a_run_with_dropout_goes_on_to_the_last_bit(describing, tmp_path):
    words = [
        *describing,
        f"run_dir={tmp_path}",
        "train.gradient_accumulation_steps=2",
        "train.keep_last=4",
        "data.caption_sampling=cycle",
        "data.languages=[]",
    ]
    assert ranks(2, SCRIPT, *words).returncode == 0
    undisturbed = trace(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/step-00000004")
    done = ranks(2, SCRIPT, *words)
    assert done.returncode == 0 and "2 done of 4" in done.stdout, done.stderr
    assert trace(tmp_path) == undisturbed


@pytest.fixture(scope="module")
def learnt(describing, tmp_path_factory):
    """(run folder, words that evaluate it): the sample's spoken names, learnt by heart by a tiny CLIP from nothing."""
    run_dir = tmp_path_factory.mktemp("learnt")
    words = [*describing, f"run_dir={run_dir}", "model.head_dropout=0", "train.lr=3e-3", "train.log_every=50"]
    words += ["train.max_steps=160", "train.batch_size=18", "train.save_every=160"]
    done = ranks(1, SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    return run_dir, words


def evaluated(learnt, *more, n=1, env=None):
    """(metrics, manifest, results by id) of an evaluation."""
    run_dir, words = learnt
    done = ranks(n, "launch/evaluate.py", *words, *more, env=env)
    assert done.returncode == 0, done.stderr
    made = evaluation(run_dir, done.stdout)
    files = (json.loads((made / f"{name}.json").read_text()) for name in ("metrics", "manifest", "results"))
    metrics, manifest, results = files
    return metrics["caption"], manifest, {row["image_id"]: row["caption"] for row in results}, done


def test_the_sample_is_learnt_by_heart(learnt, sample_shards, no_java, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    metrics, _, results, done = evaluated(learnt, f"data.test={sample_shards}/speech_fr/train", env=no_java)
    made = evaluation(learnt[0], done.stdout)
    references = json.loads((made / "references.json").read_text())["annotations"]
    truth = {row["image_id"]: [row["caption"]] for row in references}
    best, _ = captioning.score({name: texts[0] for name, texts in truth.items()}, truth)  # the references themselves
    assert metrics["CIDEr"] >= 0.95 * best["CIDEr"] > 400 and metrics["BLEU-1"] > 95
    assert metrics["ci"]["CIDEr"][0] <= metrics["CIDEr"] <= metrics["ci"]["CIDEr"][1]
    page = (made / "report.html").read_text()
    said = [json.dumps(text, ensure_ascii=False)[1:-1] for text in results.values()]
    assert "beam 5" in page and "CIDEr" in page and all(text in page for text in said)
    table = ranks(1, "launch/evaluate.py", "--table", learnt[0])
    assert f"| {made} (beam 5, not PTB's words) | av | " in table.stdout, table.stdout + table.stderr


def test_without_java_the_rest_is_scored_and_two_ranks_write_what_one_writes(learnt, no_java):
    one, two = (evaluated(learnt, "eval.batch_size=4", n=n, env=no_java) for n in (1, 2))
    assert one[:3] == two[:3]
    metrics, manifest, results, done = one
    assert metrics["n_clips"] == 20 and len(results) == 20 and manifest["no_media"] == []
    assert "METEOR" not in metrics and metrics["CIDEr"] > 100 and "no Java" in metrics["excluded"]
    assert len([line for line in done.stdout.splitlines() if "no Java" in line]) == 1
    heard, manifest, _, _ = evaluated(learnt, "model.modalities=a", "decode.method=greedy", env=no_java)
    assert len(manifest["no_media"]) == 2 and all(name.startswith("pictures/") for name in manifest["no_media"])
    assert heard["CIDEr"] < metrics["CIDEr"]


def test_the_nearest_clip_gives_its_caption(learnt, sample_shards, no_java):
    train, test = sample_shards / "speech_fr/train", sample_shards / "speech_es/test"
    _, _, results, _ = evaluated(learnt, "decode.method=nearest", f"data.test={test}", env=no_java)
    model = Model.from_checkpoint(next(learnt[0].glob("checkpoints/step-*")))
    (known, _), (asked, _) = (looks(folder, model) for folder in (train, test))
    texts = {}
    for path in train.glob("*.tar"):
        with tarfile.open(path) as tar:
            clips = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
        texts |= {clip["id"]: clip["captions"][clip["caption_langs"].index("en")] for clip in clips}
    for name, look in asked.items():
        cosines = {other: float(look @ vector) for other, vector in known.items()}
        assert results[name] == texts[max(cosines, key=cosines.get)]


@pytest.mark.parametrize(
    "script, wrong, said",
    [
        (SCRIPT, ["loss.caption=0"], "loss.caption is 0"),
        (SCRIPT, ["loss.tm=1"], "captioner is trained by loss.caption, classifier by loss.label"),
        (SCRIPT, ["model.head=global_local"], "captioning and captioner go together"),
        (SCRIPT, ["eval.task=retrieval"], "is evaluated by eval.task=captioning"),
        (
            SCRIPT,
            ["eval.every_steps=2", "eval.best_metric=caption/SPICE"],
            "no such number; there is caption, each with BLEU-1, ",
        ),
        (SCRIPT, ["loss.label_smoothing=2"], "loss.label_smoothing=2: it is a share"),
        (
            SCRIPT,
            ["model.max_tokens=100", "run_dir=NEW"],
            "model.max_tokens=100: the text tower of model.clip reads 77 at most",
        ),
        (SCRIPT, ["data.languages=[english]", "run_dir=NEW"], "step 1: no clip of the batch has a caption to learn"),
        (SCRIPT, ["decode.max_new_tokens=16"], "at most 15: model.max_tokens=16 less [SOS]"),
        (SCRIPT, ["train.compile=aot_eager"], "set train.compile=off"),
        (SCRIPT, ["data.precomputed_embeddings=require"], "the text tower trains"),
        (SCRIPT, ["model.modalities=v"], "no loss runs the audio tower"),
        (
            "launch/evaluate.py",
            ["data.languages=[xx]"],
            "no clip has a caption to compare with (data.languages=['xx'])",
        ),
        ("launch/evaluate.py", ["model.max_tokens=20"], "model.max_tokens is 16 there and 20 here"),
    ],
)
def test_mistakes_are_one_line(learnt, script, wrong, said, monkeypatch, capsys, tmp_path):
    """In this process: what is refused is refused before there is anything to undo."""
    wrong = [word.replace("NEW", str(tmp_path)) for word in wrong]
    monkeypatch.setattr("sys.argv", [script, *map(str, learnt[1]), *wrong])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and said in line
