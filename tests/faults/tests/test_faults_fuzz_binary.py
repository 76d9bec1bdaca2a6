"""A slice of the campaign on binary files (tests/faults/fuzz_binary.py): mutated ones, and hostile ones by name."""

import collections
import io
import json
import os
import pickle
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import _pictures, _tars, _weights, fuzz_binary
from running import TINY
from safetensors.torch import save_model

from clip4vla import CLIP4VLA
from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.io import safe_load
from clip4vla.media import av_reader, worker_pool
from clip4vla.models.model import Model
from clip4vla.search import builder
from clip4vla.search.index import Index

HOSTILE = [
    ("tars", "size_negative"), ("tars", "_of_digits"), ("tars", "400_"), ("pictures", "claims_60000"),
    ("pictures_in_shards", "claims_60000"), ("media", "rate_"), ("weights", "code"),
]  # fmt: skip


@pytest.mark.parametrize("name", fuzz_binary.MIB)
def test_mutated_files_are_read_counted_or_refused(name, tmp_path):
    fuzz_binary._quiet()
    assert fuzz_binary.mutated(name, tmp_path, seed=0, cases=30)["cases"] == 30


@pytest.mark.parametrize("name, which", HOSTILE)
def test_hostile_files_are_read_counted_or_refused(name, which, tmp_path):
    fuzz_binary._quiet()
    assert fuzz_binary.hostile(name, tmp_path, seed=0, only=which)["cases"] >= 2


def test_what_is_not_damaged_is_read(tmp_path):
    files = _weights.Files(tmp_path)
    for name, data in files.named.items():
        (tmp_path / name).write_bytes(data)
        _weights.brought(tmp_path / name)
    _weights.pretrained(tmp_path, files.model, json.dumps(files.config).encode())
    assert _weights.tensors(tmp_path / "x.pt", files.deepspeed) is None
    (tmp_path / "shard").mkdir()
    folder = _tars.whole(tmp_path / "shard")
    assert _pictures.loaded(folder, 0, tmp_path / "corrupt.jsonl") == "correct"


def test_torchscript_archives_give_what_torch_reads_and_run_nothing(tmp_path):
    (tmp_path / "clip.pt").write_bytes(_weights.scripted())
    state, jit = safe_load.read(tmp_path / "clip.pt")
    theirs = torch.jit.load(tmp_path / "clip.pt").state_dict()
    assert jit and state.keys() == theirs.keys() and all(torch.equal(state[k], theirs[k]) for k in theirs)
    (tmp_path / "evil.pt").write_bytes(_weights.saving(tmp_path / "canary"))
    safe_load.read(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()
    torch.jit.load(tmp_path / "evil.pt")  # which is why
    assert (tmp_path / "canary").exists()


class _Holds:
    """Pickled as a TorchScript module that holds these."""

    def __init__(self, **held):
        self.held = held

    def __reduce__(self):
        return _Holds, (), self.held


class _Storage:
    pass


class _Tensor:
    """Pickled as a tensor."""

    def __init__(self, parts):
        self.parts = parts

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.parts


def _archive(path, root, data=b""):
    """A TorchScript archive of these modules, whose storages are all the same bytes."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", len(data) // 4) if isinstance(thing, _Storage) else None

    text = io.BytesIO()
    Pickler(text, protocol=2).dump(root)
    named = text.getvalue().replace(f"c{_Holds.__module__}\n_Holds\n".encode(), b"c__torch__\n_Holds\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": named, "constants.pkl": b"", "data/0": data}.items():
            archive.writestr(f"x/{name}", content)


def test_modules_that_hold_each_other_over_and_over_are_refused(tmp_path):
    module = _Holds()
    for _ in range(40):
        module = _Holds(a=module, b=module)
    _archive(tmp_path / "x.pt", module)
    with pytest.raises(ValueError, match="modules"):
        safe_load.read(tmp_path / "x.pt")


def test_a_storage_that_tensors_share_is_unpacked_once(tmp_path):
    data = np.arange(4, dtype="<f4").tobytes()
    tensor = (_Storage(), 0, (4,), (1,), False, collections.OrderedDict())
    _archive(tmp_path / "x.pt", _Holds(**{f"t{i}": _Tensor(tensor) for i in range(9)}), data)
    state, _ = safe_load.read(tmp_path / "x.pt")
    assert len(state) == 9 and len({value.data_ptr() for value in state.values()}) == 1
    assert state["t3"].tolist() == [0, 1, 2, 3]


def test_canaries_sing_where_pickles_are_read(tmp_path):
    pickle.loads(pickle.dumps(_tars.Code(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def _crashes_on_one_hangs_on_another(words):
    if "crash" in words[0]:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in words[0]:
        time.sleep(100)


def test_a_search_index_is_built_around_files_that_crash_and_hang_their_decoder(tmp_path, monkeypatch):
    """The real media reader but for two files, which do to the process what a fault in a decoder does."""
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    model = Model(TINY, ModelConfig(clip="ViT-B-32"), SpectrogramConfig())
    save_model(model, str(tmp_path / "model/model.safetensors"))
    (tmp_path / "model/config.json").write_text(json.dumps(model.config()))
    (tmp_path / "media").mkdir()
    for name in ("a", "crash", "hang", "z"):
        (tmp_path / f"media/{name}.png").write_bytes(_pictures.encoded("PNG"))
    real = builder.media

    def reader(model, *words):
        _crashes_on_one_hangs_on_another(words)
        return real(model, *words)

    monkeypatch.setattr(builder, "media", reader)
    loaded = CLIP4VLA.from_pretrained(tmp_path / "model")
    builder.build(loaded, "m", [str(tmp_path / "media")], tmp_path / "index", decode_timeout=2)
    reasons = {
        row["name"]: row["reason"] for row in map(json.loads, open(tmp_path / "index/corrupt.jsonl", encoding="utf-8"))
    }
    assert reasons == {"crash.png": "crashed the decoder (SIGSEGV)", "hang.png": "gave up after 2 s"}
    assert Index(tmp_path / "index").store.counts()["items"] == 2


def _counting(stop):
    yield from range(stop)
    raise ValueError("corrupt from here")


def test_what_is_read_apart_comes_as_it_is_made_with_its_errors():
    apart, got = worker_pool.IsolatedIterator(_counting, 5), []
    for _ in range(2):
        with pytest.raises(ValueError, match="corrupt from here"):
            got += [list(apart.iterate(3))]
    first = apart.process.pid
    assert next(apart.iterate(3)) == 0 and apart.process.pid == first
    apart.close()
    assert not Path(f"/proc/{first}").exists()


def test_large_pictures_on_white_are_as_they_were_in_one_piece():
    from PIL import Image, ImageOps

    from clip4vla.media.images import BAND, Fit, fitted

    pixels = np.random.default_rng(0).integers(0, 256, (2 * BAND + 7, 90, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    want = np.asarray(ImageOps.pad(flat, (224, 224), Image.Resampling.BICUBIC, color="white"))
    assert np.array_equal(fitted(image, Fit((224, 224))), want)


def test_windows_of_an_absurd_length_are_not_listed():
    assert next(av_reader.window_bounds(0.0, 1e15, 17.92, 1.792)) == (0.0, 17.92)


def test_a_config_of_more_weights_than_the_file_has_is_refused(tmp_path):
    files = _weights.Files(tmp_path)
    for what in ("10^12 words", "10^9 queries of a pool"):
        with pytest.raises(UserError, match=r"towers of \d+ weights, the file has"):
            _weights.configured(files, tmp_path, _weights.CONFIGS[what])
