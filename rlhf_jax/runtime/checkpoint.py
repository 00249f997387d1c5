"""Checkpoints through Orbax: one folder a state, in it one sub-folder a step, committed by rename."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


def save(folder: Path, step: int, state: Any, *, notes: dict | None = None, keep: int = 2) -> None:
    """Write `state` (a pytree of arrays) as `step` and wait until it is committed.

    What an earlier, killed save left unfinished in `folder` is removed first: one writer at a time.

    Args:
      folder: of this one state; made when missing.
      step: non-negative; must be newer than every step in the folder.
      state: arrays only.
      notes: small JSON-able facts stored beside the arrays (model shape, tokenizer hash).
      keep: how many steps stay; older ones go after the new one is safe.

    Raises:
      FileExistsError: the folder holds this step or a later one.
      ValueError: a leaf of `state` is no array, or `notes` is no JSON. Nothing was written.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not isinstance(leaf, jax.Array | np.ndarray) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(f"state{jax.tree_util.keystr(path)} is a {kind}, only arrays of numbers are saved")
    notes = json.loads(json.dumps(notes or {}, allow_nan=False))
    newest = latest_step(folder)
    if newest is not None and newest >= step:
        raise FileExistsError(
            f"{folder} holds step {newest}, so step {step} was not saved: a checkpoint is never overwritten"
        )
    with _manager(folder, keep=keep, cleanup_tmp_directories=True) as manager:
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)))
        manager.wait_until_finished()


def latest_step(folder: Path) -> int | None:
    """The newest committed step, or None."""
    return max(_steps(folder), default=None)


def restore(folder: Path, like: Any, *, step: int | None = None) -> Any:
    """Read a state back, onto any number of devices.

    Args:
      folder: that `save` wrote to.
      like: a pytree of arrays or `jax.ShapeDtypeStruct` in the form of the saved state. Leaves with a sharding are put
        there; those without one come back uncommitted, so that `jit` may move them.
      step: None takes the newest.

    Raises:
      FileNotFoundError: this step, or any, was not committed there.
      ValueError: what is stored has other names, shapes or dtypes than `like`.
    """
    step = _existing_step(folder, step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_wanted_sharding(leaf) or here), like
    )
    with _manager(folder) as manager:
        _check_form(folder, step, manager.item_metadata(step)["state"], target)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = manager.restore(step, args=args)["state"]
    return jax.tree.map(lambda leaf, x: x if _wanted_sharding(leaf) else jnp.array(np.asarray(x)), like, state)


def read_notes(folder: Path, *, step: int | None = None) -> dict:
    """The facts stored beside the arrays; `step` None takes the newest."""
    step = _existing_step(folder, step)
    with _manager(folder) as manager:
        return manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]


def _manager(folder: Path, *, keep: int | None = None, **options: Any) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, **options)
    handlers = {"state": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(Path(folder).resolve(), options=options, item_handlers=handlers)


def _steps(folder: Path) -> list[int]:
    """Committed steps, oldest first; an unfinished save has another name."""
    if not Path(folder).is_dir():
        return []
    with _manager(folder) as manager:
        return sorted(manager.all_steps())


def _existing_step(folder: Path, step: int | None) -> int:
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}: run the act that writes it first")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no step {step} in {folder}: it holds {steps}")
    return steps[-1] if step is None else step


def _wanted_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where `like` asks the leaf to be; an uncommitted array is nowhere in particular."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None


def _check_form(folder: Path, step: int, stored: Any, wanted: Any) -> None:
    """Compare names, shapes and dtypes first, so that a wrong model is named and not half loaded."""
    stored_form, wanted_form = _form(stored), _form(wanted)
    wrong = [
        f"{name}: stored {stored_form.get(name, 'nothing')}, wanted {wanted_form.get(name, 'nothing')}"
        for name in sorted(stored_form.keys() | wanted_form.keys())
        if stored_form.get(name) != wanted_form.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"step {step} in {folder} is of another model, nothing was loaded. {'; '.join(wrong[:8])}{more}. "
            "Restore it with the configuration that it was saved with"
        )


def _form(tree: Any) -> dict[str, str]:
    """Path without punctuation → dtype and shape: dataclass fields, dict keys and tuple places are spelled alike."""
    return {
        "/".join(jax.tree_util.keystr((entry,), simple=True) for entry in path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
