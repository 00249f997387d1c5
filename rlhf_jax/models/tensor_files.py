"""Safetensors folders: one file or an index of shards, checked before the first byte of a tensor is read.

The format is a length, a JSON header with dtype, shape and place of every tensor, and the bytes. Files are written by the
`safetensors` package; they are read here, one tensor at a time and without mapping them into memory, so that a load
needs little more memory than its result.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LONGEST_HEADER = 100_000_000


class Stored(NamedTuple):
    """Where one tensor lies."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    def read(self) -> np.ndarray:
        """The tensor; raises `ValueError` where the file has become shorter."""
        count = math.prod(self.shape)
        flat = np.fromfile(self.path, self.dtype, count=count, offset=self.offset)
        if flat.size != count:
            raise ValueError(f"{self.path}: ends inside a tensor. Fix: copy the file again")
        return flat.reshape(self.shape)


def read_object(path: Path, *, missing: str) -> dict[str, Any]:
    """A JSON object; `missing` says how to fix that the file is not there.

    Raises `FileNotFoundError`, or `ValueError` where it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Fix: {missing}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}). Fix: copy the file again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not an object. Fix: copy the file again")
    return values


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors, by name.

    Raises:
      FileNotFoundError: no safetensors there; pickled weights are named, never opened.
      ValueError: a cut file, a broken header or index, a shard outside of the folder, a tensor in two shards, or one that
        the index promises and no shard holds.
    """
    directory = Path(directory)
    if (directory / INDEX).is_file():
        return _indexed(directory)
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    pickled = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    why = f"; {', '.join(pickled)} are pickles, which can run code and are not opened" if pickled else ""
    raise FileNotFoundError(
        f"{directory}: neither {SINGLE} nor {INDEX}{why}. Fix: save the model with safetensors "
        "(`save_pretrained(directory)` of transformers does)"
    )


def _indexed(directory: Path) -> dict[str, Stored]:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: no JSON object with a weight_map ({error}). Fix: copy the file again") from error
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        path = directory / name
        if Path(name).name != name:  # a link within the folder may point anywhere
            raise ValueError(f"{index}: shard {name!r} lies outside of the folder. Nothing was read")
        if not path.is_file():
            raise ValueError(f"{index}: shard {name} is missing. Fix: copy the folder again")
        found = read_header(path)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{path}: {twice[0]} is in another shard, too. Fix: save the model again")
        tensors.update(found)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise ValueError(f"{index}: no shard holds {absent[0]} ({len(absent)} in all). Fix: copy the folder again")
    return tensors


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file; raises `ValueError` where header and bytes do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path}: no safetensors file, or cut within its header. Fix: copy the file again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: its header is no JSON ({error}). Fix: copy the file again") from error
    tensors, start = {}, 8 + length
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _stored(path, name, entry, start, size)
    return tensors


def _stored(path: Path, name: str, entry: dict, start: int, size: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: {name} has dtype {entry['dtype']}, which is unknown here; known: {', '.join(DTYPES)}"
        )
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"{path}: {name} {shape} does not fill bytes {begin} to {end}. Fix: save the model again")
    if start + end > size:
        raise ValueError(f"{path}: cut at byte {size}, before the end of {name} at {start + end}. Fix: copy it again")
    return Stored(path, dtype, shape, start + begin)


def write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int) -> None:
    """Safetensors in `directory`: one file, or shards of at most so many bytes and their index.

    Tensors are taken one by one; a shard is in memory at a time. A tensor larger than a shard gets its own.
    """
    shards, total = [], 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes), start=1):
        path = directory / f"shard-{number}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard)))
        total += sum(array.nbytes for array in shard.values())
    if len(shards) == 1:
        shards[0][0].rename(directory / SINGLE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, array in tensors:
        if shard and sum(kept.nbytes for kept in shard.values()) + array.nbytes > max_shard_bytes:
            yield shard
            shard = {}
        shard[name] = np.ascontiguousarray(array)
    yield shard
