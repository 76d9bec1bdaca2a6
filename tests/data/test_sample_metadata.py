"""sample_metadata.py: the caption of a visit, and text that is none."""

import json

import numpy as np
import pytest

from clip4vla.data.sample_metadata import draw_captions, parse

COUNTS = [0, 1, 2, 3, 10, 1000] * 9
CLIPS = [{"captions": ["a"] * count} for count in COUNTS]
KEYS = [(2**40, 7919 * i, i % 5) for i in range(len(CLIPS))]


def drawn(key, count, how):
    """The caption's number by NumPy's own generator of the clip's key."""
    seed, name, epoch = key
    if how == "cycle":
        return (np.random.default_rng((seed, name, 4)).integers(count) + epoch) % count
    return np.random.default_rng((seed, name, epoch, 1)).integers(count)


@pytest.mark.parametrize("how", ["first", "cycle", "random"])
def test_captions_of_a_batch_are_those_that_numpy_draws_clip_by_clip(how):
    expected = [
        0 if count < 2 or how == "first" else drawn(of, count, how) for of, count in zip(KEYS, COUNTS, strict=True)
    ]
    assert draw_captions(CLIPS, KEYS, how) == expected and draw_captions([], [], how) == []


FIELDS = {
    **dict.fromkeys(("id", "item", "group", "source", "split", "lang"), "a"), "audio_type": "vb",
    **dict.fromkeys(("captions", "caption_langs"), ["\U0001f3b5 \u00e9"]), "media": dict.fromkeys(("audio", "frames")),
    **dict.fromkeys(("n_frames", "n_segments", "n_rows", "duration"), 0), "has_audio": False, "has_frames": False,
    **dict.fromkeys(("start", "end", "label")),
}  # fmt: skip


@pytest.mark.parametrize("as_ascii", [True, False])
def test_half_a_surrogate_pair_is_no_text_however_it_is_written(as_ascii):
    data = json.dumps(FIELDS, ensure_ascii=as_ascii).encode()
    assert parse(data) == FIELDS  # a whole pair is
    half = FIELDS | {"group": "\ud83c"}
    for bad in (json.dumps(half).encode(), json.dumps(half, ensure_ascii=False).encode("utf-8", "surrogatepass")):
        with pytest.raises(ValueError, match="json is not JSON"):
            parse(bad)
