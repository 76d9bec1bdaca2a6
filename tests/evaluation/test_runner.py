"""evaluation.py: which things are ranked against which, in subsets, and the answers that count."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stand_ins import OneBatch, Towers

from clip4vla.config import RunConfig
from clip4vla.distributed import collectives
from clip4vla.evaluation import runner
from clip4vla.evaluation.zero_shot import TAGS, directions, embed, rank
from clip4vla.media.images import Fit
from clip4vla.models.model import TEXTS

CFG = RunConfig()


def clip(item, group, audio_type, lang, captions, langs):
    return {"id": f"{item}/{lang}", "item": item, "group": group, "audio_type": audio_type, "lang": lang,
            "captions": captions, "caption_langs": langs}  # fmt: skip


CLIPS = {
    0: clip("crow", "g1", "nb", "en", ["A crow."], ["en"]),
    1: clip("crow", "g1", "vb", "fr", ["Un corbeau.", "A crow."], ["fr", "en"]),
    3: clip("owl", "g2", "vb", "fr", ["Un hibou.", "An owl."], ["fr", "en"]),
    4: clip("owl_mirror", "g2", "vb", "es", ["Un búho.", "An owl."], ["es", "en"]),
    5: clip("cup", "g3", "both", "", ["A cup."], []),
}


def unit(*values):
    return torch.nn.functional.normalize(torch.tensor(values, dtype=torch.float32), dim=0)


VECTORS = {
    "video": {i: unit(1, i, 0) for i in CLIPS},
    "audio/data": {i: unit(1, 0, i) for i in (0, 1, 3, 4)},  # 5 is silent
    "text": {(i, j): unit(1, i, j) for i, c in CLIPS.items() for j in range(len(c["captions"]))},
}


def pairs():
    return {name: (query, gallery) for name, query, gallery in directions(CLIPS, VECTORS, "data")}


def test_six_directions_and_their_subsets():
    names = set(pairs())
    six = {f"{a}_to_{b}" for a, b in (("text", "video"), ("text", "audio"), ("audio", "video"))}
    six |= {"_to_".join(reversed(name.split("_to_"))) for name in six}
    assert six <= names
    assert {
        "text_to_audio/vb",
        "text_to_audio/nb",
        "text_to_audio/vb-fr",
        "audio_to_video/vb-es",
        "text_to_video/fr",
    } <= names
    assert "text_to_audio/both" not in names  # the cup makes no sound


def test_pictures_and_captions_of_an_item_count_once():
    found = pairs()
    query, gallery = found["text_to_video"]
    assert sorted(query.text) == ["A crow.", "A cup.", "An owl.", "An owl.", "Un búho.", "Un corbeau.", "Un hibou."]
    assert [CLIPS[i]["item"] for i in gallery.clip] == ["crow", "owl", "owl_mirror", "cup"]
    query, gallery = found["text_to_audio"]
    assert len(gallery.clip) == 4 and "A cup." not in query.text


def test_subsets_restrict_sounds_and_their_captions_but_not_pictures():
    query, gallery = pairs()["text_to_audio/vb-fr"]
    assert gallery.clip == [1, 3] and sorted(query.text) == ["A crow.", "An owl.", "Un corbeau.", "Un hibou."]
    query, gallery = pairs()["audio_to_video/vb-fr"]
    assert query.clip == [1, 3] and len(gallery.clip) == 4
    query, gallery = pairs()["text_to_video/fr"]
    assert sorted(query.text) == ["Un corbeau.", "Un hibou."] and len(gallery.clip) == 4


def test_any_item_of_the_querys_group_is_right():
    query, gallery = pairs()["text_to_video/es"]
    result = rank(query, gallery, CFG)
    assert (result["n_queries"], result["n_gallery"]) == (1, 4)
    assert result["MeanR"] == 1  # the search for "Un búho." may find either owl


def test_subsets_are_those_of_the_commonest_tags():
    """Each costs a permutation test; the others' captions stay in the whole direction."""
    langs = [f"l{i:03d}" for i in range(100) for _ in range(1 + (i >= 70))]  # the last 30 twice
    clips = {i: clip(f"x{i}", f"g{i}", "nb", "", [f"text {i}"], [lang]) for i, lang in enumerate(langs)}
    vectors = {
        "video": {i: unit(1, i, 0) for i in clips},
        "audio/data": {},
        "text": {(i, 0): unit(1, i, 1) for i in clips},
    }
    found = {name: query for name, query, _ in directions(clips, vectors, "data")}
    subsets = [name.partition("/")[2] for name in found if name.startswith("text_to_video/")]
    assert subsets == [f"l{i:03d}" for i in range(70, 70 + TAGS)]
    assert len(found["text_to_video"].text) == len(langs)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_in_evaluation_mode_while_it_embeds_and_then_as_it_was(monkeypatch, training):
    model, modes = Towers().train(training), []
    model.text.transformer.register_forward_pre_hook(lambda tower, _: modes.append(tower.training))
    folder = SimpleNamespace(url="x", fingerprint=model.config())
    monkeypatch.setattr(runner, "open_folders", lambda *_: [folder])
    monkeypatch.setattr(runner, "eval_loader", lambda *_: OneBatch(3))
    runner.run_inference(model, CFG, {}, "data.val")
    assert modes == [False] and {part.training for part in model.modules()} == {training}


def test_captions_are_read_as_the_checkpoint_says_where_the_file_of_model_clip_is_gone(sample_shards, tmp_path):
    """A tower whose words attend to all places gets the length of its training, which its configuration alone tells."""
    cfg = replace(CFG, run_dir=str(tmp_path), model=replace(CFG.model, clip="gone.json", max_tokens=9))
    folders = runner.open_folders({f"{sample_shards}/sounds/val": 1.0}, "data.val", cfg.data)
    text = {"context_length": 12, "no_causal_mask": True}
    model = SimpleNamespace(clip_config={"text_cfg": text}, pictures=Fit((256, 256)))
    loader = runner.eval_loader(cfg, folders, torch.device("cpu"), model=model)
    assert loader.tokenize(["a dog"]).shape == (1, 12)


@torch.no_grad()
def test_captions_of_a_batch_are_read_a_few_at_a_time():
    model, loader = Towers(), OneBatch(3, 0, 2 * TEXTS, 1)
    vectors = embed(model, loader, CFG).vectors["text"]
    assert model.passes == [TEXTS, TEXTS, 4]
    texts = {(i, j): text for i, meta in enumerate(loader.meta) for j, text in enumerate(meta["captions"])}
    want = torch.nn.functional.normalize(model.encode_tokens(loader.tokenize(list(texts.values())))[0], dim=-1)
    assert list(vectors) == list(texts)
    torch.testing.assert_close(torch.stack(list(vectors.values())), want, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("captions", [0, 3])
def test_a_rank_with_fewer_captions_runs_the_text_tower_as_often_as_the_others(monkeypatch, captions):
    """Under ZeRO-3 they would wait for each other without end."""
    monkeypatch.setattr(
        collectives, "all_gather_objects", lambda passes: [passes, 3] if isinstance(passes, int) else [passes]
    )
    model = Towers()
    assert len(embed(model, OneBatch(captions), CFG).vectors["text"]) == captions
    assert model.passes == [captions or 1, 1, 1]


def test_no_direction_without_an_answer():
    silent = {**VECTORS, "audio/data": {}}
    assert all("audio" not in name for name, _, _ in directions(CLIPS, silent, "data"))
