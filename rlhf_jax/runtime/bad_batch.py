"""The batch over which a step went wrong, as a file to look into and to replay. Data only: nothing in it is ever executed."""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.runtime.fingerprint import named_leaves
from rlhf_jax.runtime.processes import is_first, on_every_host

_FORMS = "__forms__"


def dump_batch(folder: Path, step: int, batch: Any) -> Path:
    """Write a pytree of arrays as `bad_batch_STEP.npz`, over an older one of that step; returns the path.

    Raises:
      ValueError: a leaf is no array of numbers. Nothing was written.
    """
    leaves = named_leaves(batch)
    for name, leaf in leaves:
        numbers = isinstance(leaf, jax.Array | np.ndarray) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if not numbers or leaf.dtype.kind in "OUSMm":
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(f"batch {name} is a {kind}, only arrays of numbers are written; fix: leave it out")
    forms = {name: str(leaf.dtype) for name, leaf in leaves}
    arrays = {f"{i}": _raw(on_every_host(leaf)) for i, (_, leaf) in enumerate(leaves)}
    path = Path(folder) / f"bad_batch_{step}.npz"
    if not is_first():
        return path
    with path.open("wb") as file:
        np.savez(file, **arrays, **{_FORMS: np.frombuffer(json.dumps(forms).encode(), np.uint8)})
    return path


def load_batch(path: Path, like: Any = None) -> Any:
    """Read what `dump_batch` wrote, bit for bit, as numpy arrays.

    Args:
      path: of the file.
      like: a pytree in the form of the batch (arrays or `jax.ShapeDtypeStruct`); None gives `{path in the tree: array}`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is damaged or another kind of file, or its leaves are not those of `like`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            forms = json.loads(stored[_FORMS].tobytes())
            arrays = {
                name: stored[f"{i}"].view(jnp.dtype(dtype)).reshape(stored[f"{i}"].shape[:-1])
                for i, (name, dtype) in enumerate(forms.items())
            }
    except FileNotFoundError:
        raise
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        TypeError,
        AttributeError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path} is no batch that a run left behind, nothing was loaded ({error})") from error
    if like is None:
        return arrays
    names = [name for name, _ in named_leaves(like)]
    if sorted(names) != sorted(arrays):
        raise ValueError(f"{path} holds {sorted(arrays)}, wanted {sorted(names)}: a batch of another stage")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])


def _raw(leaf: np.ndarray) -> np.ndarray:
    """Bytes with the itemsize as a last dimension: npz files know no bfloat16."""
    return np.ascontiguousarray(leaf).reshape(*leaf.shape, 1).view(np.uint8)
