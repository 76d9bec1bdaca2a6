"""evaluation.py: which things are ranked against which, in subsets, and the answers that count."""

import torch

from clip4vla.config import RunConfig
from clip4vla.zero_shot import directions, rank

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


def test_no_direction_without_an_answer():
    silent = {**VECTORS, "audio/data": {}}
    assert all("audio" not in name for name, _, _ in directions(CLIPS, silent, "data"))
