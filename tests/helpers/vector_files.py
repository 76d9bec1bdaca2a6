"""Files of vectors as another program would write them (data_prep/packed/vectors.py says how)."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file


def parquet(path: Path, rows: list[dict], space: str = "", **types: pyarrow.DataType) -> Path:
    lists = pyarrow.list_(pyarrow.list_(pyarrow.float32()))
    kinds = {"id": pyarrow.string(), "text": lists, "vision": lists} | types
    fields = [(name, kinds[name]) for name in rows[0]]
    schema = pyarrow.schema(fields, metadata={"space": space} if space else None)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=3)
    return path


def named(vectors: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{kind}/{key}": x.contiguous() for key, kinds in vectors.items() for kind, x in kinds.items()}


def write(path: Path, vectors: dict[str, dict[str, torch.Tensor]], space: str = "") -> Path:
    """In the format that the name's ending says."""
    if path.suffix == ".parquet":
        return parquet(path, [{"id": k} | {n: x.tolist() for n, x in v.items()} for k, v in vectors.items()], space)
    if path.suffix == ".npz":
        arrays = {name: x.numpy() for name, x in named(vectors).items()}
        np.savez(path, **arrays, **({"space": np.array(space)} if space else {}))
    else:
        save_file(named(vectors), path, {"space": space} if space else None)
    return path
