"""Every public method of the Python API names an argument of another kind than it takes in one line."""

import numpy as np
import pytest
import torch
from media_models import SOUNDS, STILLS, make
from PIL import Image

from clip4vla import CLIP4VLA
from clip4vla.data.preprocessing import ClipInput
from clip4vla.errors import UserError

WAVE = np.sin(np.arange(16000, dtype=np.float32))
THING = object()
TWO = torch.zeros(2, 64)
FRAMES = ClipInput(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
NO_CLIPS = [
    [None], ["a"], [ClipInput(torch.zeros(3))], [ClipInput(np.zeros((1, 3, 224, 224), np.uint8))], [ClipInput(rows="3")],
    [ClipInput(segments=torch.zeros(1, 3, 224, 224, dtype=torch.uint8))], [ClipInput(FRAMES.frames.float())], None, FRAMES,
]  # fmt: skip
NO_TEXTS = [None, 3, THING, b"x", [None], {"a": 1}, {"a"}, [["a"]], float("nan")]
NO_RATES = [
    "44100",
    "abc",
    b"1",
    THING,
    1j,
    np.array([16000]),
    torch.zeros(2),
    float("inf"),
    float("nan"),
    None,
    0,
    1.5,
]
NO_SOUNDS = [
    None,
    3,
    THING,
    b"x",
    {"a": 1},
    np.array("a"),
    np.array([None]),
    (WAVE,),
    (None, 16000),
    torch.zeros(9) * 1j,
]
NO_PICTURES = [
    None,
    3.5,
    THING,
    b"x",
    {"a": 1},
    np.array("a"),
    torch.zeros(2),
    Image.Image(),
    torch.zeros(4).bfloat16(),
]
NO_MEDIA = [None, 3, THING, b"x", WAVE, (WAVE, 16000), (SOUNDS[0],), (STILLS[0], 3), (STILLS[0],) * 3]
NO_NAMES = [None, 3, THING, b"x", "", "a\0b", ["a"]]


@pytest.fixture(scope="module")
def model():
    return make()


def calls(model, folder):
    """(name, the call of one argument, values that are none)."""
    captioner = make(head="captioner")
    encode = model.encode
    return [
        ("encode_text", model.encode_text, NO_TEXTS),
        ("encode_audio", lambda x: model.encode_audio(x, 16000), NO_SOUNDS),
        ("encode_audio, several", lambda x: model.encode_audio([SOUNDS[0], x], 16000), NO_SOUNDS),
        ("encode_audio, rate", lambda x: model.encode_audio(WAVE, x), NO_RATES),
        ("encode_audio, pair", lambda x: model.encode_audio((WAVE, x)), NO_RATES),
        ("encode_audio, audio_type", lambda x: model.encode_audio(WAVE, 16000, x), [THING, [], 3, "x", b"vb", True]),
        ("encode_video", model.encode_video, NO_PICTURES),
        ("encode", lambda x: encode(x, ["vb"]), NO_CLIPS),
        ("encode, audio_types", lambda x: encode([FRAMES], x), [None, 3, "vb", [None], [3], ["x"]]),
        ("similarity, texts", lambda x: model.similarity(x, STILLS[0]), [*NO_TEXTS, TWO]),
        ("similarity, media", lambda x: model.similarity("a", x), [*NO_MEDIA, TWO, [STILLS[0], None]]),
        ("similarity, vectors", lambda x: model.similarity(TWO, x), [torch.zeros(3, 5), torch.zeros(64), TWO.numpy()]),
        ("similarity, audio_type", lambda x: model.similarity("a", STILLS[0], x), [THING]),
        ("classify, media", lambda x: model.classify(x, ["a", "b"]), NO_MEDIA),
        ("classify, labels", lambda x: model.classify(STILLS[0], x), [*NO_TEXTS, "ab", []]),
        ("classify, templates", lambda x: model.classify(STILLS[0], ["a"], None, x), [3, THING, b"{}", [3], ["{}", None]]),
        ("caption, media", captioner.caption, NO_MEDIA),
        ("caption, seed", lambda x: captioner.caption(STILLS[0], seed=x), ["1", -1, 1.5, None]),
        ("caption, decode", lambda x: captioner.caption(STILLS[0], method=x), [3, None, THING]),
        ("from_pretrained", CLIP4VLA.from_pretrained, [*NO_NAMES, "x" * 300, "$GONE/x"]),
        ("from_pretrained, cache_dir", lambda x: CLIP4VLA.from_pretrained("no/such", cache_dir=x), [3, "", "$GONE/x"]),
        ("from_pretrained, device", lambda x: CLIP4VLA.from_pretrained(folder, device=x), ["foo", THING, "cuda:77"]),
        ("from_pretrained, dtype", lambda x: CLIP4VLA.from_pretrained(folder, dtype=x), ["fp16", THING, torch.int8]),
        ("save_pretrained", model.save_pretrained, [*NO_NAMES, "/proc/x", "$GONE/x"]),
    ]  # fmt: skip


def test_what_is_no_such_argument_is_one_line(model, tmp_path):
    model.save_pretrained(tmp_path / "M")
    for name, call, values in calls(model, tmp_path / "M"):
        for value in values:
            try:
                call(value)
            except UserError as error:
                assert str(error) and "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{name}: {value!r}") from error
            else:
                raise AssertionError(f"{name}: {value!r} was taken")


def test_what_is_such_an_argument_is_taken(model, tmp_path, monkeypatch):
    same = model.encode_text(["a", "b"])
    for texts in (("a", "b"), (text for text in "ab"), np.array(["a", "b"])):
        assert torch.equal(model.encode_text(texts), same)
    same = model.encode_audio(WAVE, 16000)
    for rate in (np.int64(16000), 16000.0, torch.tensor(16000), torch.tensor([16000])):
        assert torch.equal(model.encode_audio((torch.tensor(WAVE), rate)), same)
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_pretrained("~/M")
    assert torch.equal(CLIP4VLA.from_pretrained("$HOME/M").encode_audio(WAVE, 16000), same)
