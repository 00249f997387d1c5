"""Checkpoints through Orbax: `save`, `latest_step`, `restore`. A folder holds one sub-folder a step, committed by rename."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def save(folder: Path, step: int, state: Any, *, notes: dict | None = None, keep: int = 2) -> None:
    """Write `state` (a pytree of arrays) as `step` and wait until it is committed.

    Args:
      folder: of this one state; made when missing.
      step: non-negative; must be new.
      state: arrays only.
      notes: small JSON-able facts stored beside the arrays (model shape, tokenizer hash).
      keep: how many steps stay; older ones go after the new one is safe.
    """
    with _manager(folder, keep) as manager:
        items = {"state": ocp.args.StandardSave(state), "notes": ocp.args.JsonSave(notes or {})}
        if not manager.save(step, args=ocp.args.Composite(**items)):
            raise FileExistsError(f"{folder} holds step {step} or a later one; a checkpoint is never overwritten")
        manager.wait_until_finished()


def latest_step(folder: Path) -> int | None:
    """The newest committed step, or None."""
    if not Path(folder).is_dir():
        return None
    with _manager(folder, None) as manager:
        return manager.latest_step()


def restore(folder: Path, like: Any, *, step: int | None = None) -> Any:
    """Read a state back.

    Args:
      folder: that `save` wrote to.
      like: a pytree of arrays or `jax.ShapeDtypeStruct` (with shardings, if any) in the form of the saved state.
      step: None takes the newest.

    Raises:
      FileNotFoundError: nothing was committed there.
      ValueError: what is stored has another structure or other shapes than `like`.
    """
    step = latest_step(folder) if step is None else step
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {folder}: run the act that writes it first")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _manager(folder, None) as manager:
        stored = manager.item_metadata(step)["state"]
        _check_shapes(folder, step, stored, abstract)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return manager.restore(step, args=args)["state"]


def read_notes(folder: Path, *, step: int | None = None) -> dict:
    """The facts stored beside the arrays."""
    step = latest_step(folder) if step is None else step
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {folder}: run the act that writes it first")
    with _manager(folder, None) as manager:
        return manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]


def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(folder).resolve(), options=options, item_names=("state", "notes"))


def _check_shapes(folder: Path, step: int, stored: Any, wanted: Any) -> None:
    """Compare names and shapes first, so that a wrong model is named and not half loaded."""
    stored_shapes, wanted_shapes = _shapes(stored), _shapes(wanted)
    wrong = [
        f"{name}: stored {stored_shapes.get(name, 'nothing')}, wanted {wanted_shapes.get(name, 'nothing')}"
        for name in sorted(stored_shapes.keys() | wanted_shapes.keys())
        if stored_shapes.get(name) != wanted_shapes.get(name)
    ]
    if wrong:
        raise ValueError(f"step {step} in {folder} is of another model, nothing was loaded. " + json.dumps(wrong[:8]))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path without punctuation → shape: dataclass fields, dict keys and tuple places are spelled alike."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(jax.tree_util.keystr((entry,), simple=True) for entry in path): tuple(leaf.shape)
        for path, leaf in leaves
    }
