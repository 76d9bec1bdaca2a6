"""Files of vectors that another program computed: the three formats, and what is wrong with them."""

import hashlib
import re

import pyarrow
import pytest
import torch
from vector_files import parquet, write

from clip4vla.errors import UserError
from data_prep.packed.vectors import VectorFiles


def test_formats_give_the_same(tmp_path):
    torch.manual_seed(1)
    vectors = {"a": {"text": torch.randn(2, 8), "vision": torch.randn(3, 8)}, "b/c": {"text": torch.randn(1, 8)}}
    for ending in (".npz", ".safetensors"):
        held = VectorFiles([str(write(tmp_path / f"v{ending}", vectors, "s"))], tmp_path)
        assert held.identity == hashlib.sha256(b"s").hexdigest() and held.kinds() == ["text", "vision"]
        for key, kinds in vectors.items():
            for kind, x in kinds.items():
                want = torch.nn.functional.normalize(x, dim=1).half()
                assert held.get(kind, key) == want.numpy().tobytes() and held.count(kind, key) == len(x)
        assert held.get("vision", "b/c") == b"" and held.count("vision", "b/c") == held.count("text", "z") == 0
    one = pyarrow.list_(pyarrow.float64(), 8)
    rows = [
        {"id": k, "text": v["text"].tolist(), "vision": v.get("vision", torch.ones(1, 8))[0].tolist()}
        for k, v in vectors.items()
    ]
    tables = [
        parquet(tmp_path / "v.parquet", rows, "s", vision=one),
        parquet(tmp_path / "w.parquet", [{"id": "n", "text": None}], "s"),
    ]
    read = VectorFiles(list(map(str, tables)), tmp_path)
    assert read.get("text", "a") == held.get("text", "a") and read.get("vision", "a") == held.get("vision", "a")[:16]
    assert not list(tmp_path.glob("tmp*"))


def test_without_a_stated_space_the_bytes_are_its_identity(tmp_path):
    files = [str(write(tmp_path / f"{i}.npz", {str(i): {"text": torch.ones(1, 4)}})) for i in range(3)]
    first, again, other = (VectorFiles(some, tmp_path).identity for some in (files[:2], files[1::-1], files[1:]))
    assert first == again != other
    stated = str(write(tmp_path / "s.npz", {"s": {"text": torch.ones(1, 4)}}, "x"))
    with pytest.raises(UserError, match="files of several spaces .*none.*: x"):
        VectorFiles([files[0], stated], tmp_path)


@pytest.mark.parametrize(
    "vectors, why",
    [
        ({"a": {"text": torch.ones(1, 4)}, "b": {"vision": torch.ones(2, 5)}}, "'b' have width 5, those before 4"),
        ({"a": {"words": torch.ones(1, 4)}}, "an array is named 'words/a', not text/ID or vision/ID"),
        ({"a": {"text": torch.ones(1, 4, dtype=torch.int32)}}, "needs (D,) or (n, D) floating point"),
        ({"a": {"text": torch.ones(1, 1, 4)}}, "vectors of shape (1, 1, 4)"),
        ({}, "no vectors there"),
    ],
    ids=["widths", "name", "integers", "shape", "none"],
)  # fmt: skip
def test_files_of_another_form_are_refused(tmp_path, vectors, why):
    with pytest.raises(UserError, match=re.escape(why)):
        VectorFiles([str(write(tmp_path / "v.npz", vectors))], tmp_path)


def test_an_id_has_one_row(tmp_path):
    files = [str(write(tmp_path / f"{i}.npz", {"a": {"text": torch.ones(1, 4)}}, "s")) for i in range(2)]
    with pytest.raises(UserError, match="1.npz: the text vectors of id 'a' come twice"):
        VectorFiles(files, tmp_path)


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("x.txt", b"", "none of .parquet, .npz, .safetensors"),
        ("x.npz", None, "no such file"),
        *((f"x{end}", b"PK not one", "unreadable vectors") for end in (".npz", ".safetensors", ".parquet")),
    ],
)  # fmt: skip
def test_what_is_no_file_of_vectors_is_refused(tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(why)):
        VectorFiles([str(tmp_path / name)], tmp_path)


@pytest.mark.parametrize(
    "rows, types, why",
    [
        ([{"id": "a"}], {}, "needs id, and text or vision"),
        ([{"id": None, "text": [[1.0]]}], {}, "an id is None"),
        ([{"id": "a", "text": [[1.0], [1.0, 2.0]]}], {}, "vectors of widths 1, 2 in one cell"),
        ([{"id": "a", "text": 1.0}], {"text": pyarrow.float32()}, "column text is float: needs lists"),
    ],
    ids=["columns", "id", "ragged", "number"],
)  # fmt: skip
def test_tables_of_another_form_are_refused(tmp_path, rows, types, why):
    with pytest.raises(UserError, match=why):
        VectorFiles([str(parquet(tmp_path / "v.parquet", rows, **types))], tmp_path)
