"""Checkpoints through Orbax: one folder a state, in it one sub-folder a step, committed by rename.

The order of a save: finite? → enough space? → arrays to `STEP.partial`, in the background → `record.json` → rename to
`STEP` (the commit) → prune. So a kill at any moment leaves the older steps as they were. What is read back is compared
with the record, bit by bit; a step that differs is never loaded.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.runtime import faults
from rlhf_jax.runtime.fingerprint import measure, named_leaves
from rlhf_jax.runtime.processes import is_first, meet
from rlhf_jax.runtime.record import DamagedCheckpointError, read_record, write_record

_PARTIAL = ".partial"
_PATIENCE = ocp.AsyncOptions(timeout_secs=10**9, create_directories_asynchronously=False)
"""Orbax measures deadlines with a clock that can be set: a jump must not fail a save. A real hang is told by the watchdog."""


class Writer(NamedTuple):
    """Two functions over one folder, as `writer` yields them."""

    save: Callable[..., None]
    """`save(step, state, notes=None)` returns when `state` may be donated; the rest happens in the background."""
    wait: Callable[[], None]
    """Returns when the last save is committed; raises what went wrong with it."""


def save(
    folder: Path, step: int, state: Any, *, notes: dict | None = None, keep: int = 2, for_good: int | None = None
) -> None:
    """Write `state` (a pytree of arrays) as `step` and wait until it is committed.

    Args:
      folder: of this one state; made when missing.
      step: non-negative; must be newer than every step in the folder.
      state: arrays only.
      notes: small JSON-able facts stored beside the arrays (model shape, tokenizer hash).
      keep: how many steps stay, at least 2; older ones go after the new one is safe.
      for_good: steps divisible by this stay for ever.

    Raises:
      As `Writer.save` does.
    """
    with writer(folder, keep=keep, for_good=for_good) as to:
        to.save(step, state, notes)


@contextlib.contextmanager
def writer(folder: Path, *, keep: int = 2, for_good: int | None = None, sync: Sequence[Path] = ()) -> Iterator[Writer]:
    """Save step after step into `folder` while the training goes on; leaving the `with` waits for the last one.

    What an earlier, killed save left unfinished in `folder` is removed by the first save: one writer at a time. One save
    is under way at most: the next one waits for it. `sync` are files (logs) whose content must be on disk before a
    step is committed.

    `save` raises
      FileExistsError: the folder holds this step or a later one.
      ValueError: a leaf of `state` is no array, or `notes` is no JSON.
      FloatingPointError: an element of a leaf is not finite.
      OSError: too little space, or the write failed (told by the next `save`, by `wait` or at the end of the `with`).
    In all cases the step was not written, and older steps are as they were.
    """
    if keep < 2:
        raise ValueError(f"keep {keep}: at least two steps stay, so that one damaged step is not the end; fix: keep=2")
    folder = Path(folder).resolve()
    pending: list[Future] = []
    arrays = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=_PATIENCE)

    def wait() -> None:
        while pending:
            pending.pop().result()
            meet("committed")

    def save(step: int, state: Any, notes: dict | None = None) -> None:
        wait()
        notes = json.loads(json.dumps(notes or {}, allow_nan=False))
        leaves = _checked(folder, step, state)
        partial = folder / f"{step}{_PARTIAL}"
        if is_first():
            sweep(folder)
            partial.mkdir(parents=True)
        meet("partial folder")
        arrays.save(partial / "state", args=ocp.args.StandardSave(state))
        prune = functools.partial(_prune, folder, keep=keep, for_good=for_good)
        job = functools.partial(_commit, arrays, partial, sync, prune, step=step, notes=notes, leaves=leaves)
        pending.append(pool.submit(job))

    with ThreadPoolExecutor(1, "checkpoint") as pool, contextlib.closing(arrays):
        try:
            yield Writer(save, wait)
        finally:
            wait()


def latest_step(folder: Path) -> int | None:
    """The newest committed step, or None."""
    return max(_steps(folder), default=None)


def sweep(folder: Path) -> list[str]:
    """Remove what a killed save or prune left behind; returns the names. Only the folder's one writer may do this."""
    if not Path(folder).is_dir():
        return []
    leftovers = [p for p in Path(folder).iterdir() if p.name.endswith(_PARTIAL) or ".orbax-checkpoint-tmp" in p.name]
    for path in leftovers:
        shutil.rmtree(path)
    return sorted(path.name for path in leftovers)


def restore(folder: Path, like: Any, *, step: int | None = None) -> Any:
    """Read a state back, onto any number of devices.

    Args:
      folder: that `save` wrote to.
      like: a pytree of arrays or `jax.ShapeDtypeStruct` in the form of the saved state. Leaves with a sharding are put
        there; those without one come back uncommitted, so that `jit` may move them.
      step: None takes the newest that is undamaged, and says so on stderr where it is not the newest.

    Raises:
      FileNotFoundError: this step, or any, was not committed there.
      DamagedCheckpointError: this step, or every step, has bytes that were not written so; the message names file or leaf.
      ValueError: what is stored has other names, shapes or dtypes than `like`.
    """
    if step is None:
        return restore_newest(folder, like)[1]
    return _restore_step(folder, _existing_step(folder, step), like)


def restore_newest(folder: Path, like: Any, *, tell: Callable[[str], None] | None = None) -> tuple[int, Any]:
    """Step and state of the newest undamaged step; every damaged one on the way is told (to stderr). Raises as `restore`."""
    _existing_step(folder, None)
    tell = tell or _to_stderr
    steps = _steps(folder)
    faults_found = []
    for step, older in zip(reversed(steps), [*reversed(steps[:-1]), None], strict=True):
        try:
            return step, _restore_step(folder, step, like)
        except DamagedCheckpointError as error:
            faults_found.append(str(error))
            if older is not None:
                tell(f"{error}; using step {older}")
    raise DamagedCheckpointError(
        f"no step in {folder} is whole, nothing was loaded: {'; '.join(faults_found)}. "
        "Fix: bring the files back from a copy, or move the folder away to start again"
    )


def set_aside(folder: Path, newer_than: int) -> list[Path]:
    """Rename the steps above one that was fallen back to, so that they can be written anew; returns their new names."""
    moved = []
    for step in [step for step in _steps(folder) if step > newer_than]:
        free = (Path(folder) / f"{step}.damaged{'' if i == 0 else i}" for i in range(1000))
        target = next(path for path in free if not path.exists())
        os.replace(Path(folder) / str(step), target)
        moved.append(target)
    return moved


def read_notes(folder: Path, *, step: int | None = None) -> dict:
    """The facts stored beside the arrays; `step` None takes the newest with an undamaged record. Raises as `restore`."""
    last = _existing_step(folder, step)
    candidates = [last] if step is not None else list(reversed(_steps(folder)))
    for candidate in candidates:
        try:
            return read_record(Path(folder) / str(candidate))["notes"]
        except DamagedCheckpointError as error:
            if candidate == candidates[-1]:
                raise
            _to_stderr(f"step {candidate} in {folder} is damaged: {error}")
    raise AssertionError("unreachable: there is at least one step")


def _checked(folder: Path, step: int, state: Any) -> dict[str, tuple[str, str]]:
    """Every check that comes before the first byte is written; returns the leaves' forms and fingerprints."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not isinstance(leaf, jax.Array | np.ndarray) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(f"state{jax.tree_util.keystr(path)} is a {kind}, only arrays of numbers are saved")
    newest = latest_step(folder)
    if newest is not None and newest >= step:
        raise FileExistsError(
            f"{folder} holds step {newest}, so step {step} was not saved: a checkpoint is never overwritten"
        )
    measured = measure(state)
    wrong = [name for name, (*_, finite) in measured.items() if not finite]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise FloatingPointError(
            f"step {step} is not finite at {', '.join(wrong[:4])}{more}, not saved; {_kept(folder)}"
        )
    _check_space(folder, step, state)
    forms = _form(state)
    return {name: (forms[name], f"{high:08x}{low:08x}") for name, (high, low, _) in measured.items()}


def _check_space(folder: Path, step: int, state: Any) -> None:
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"step {step} needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free on {there}; not saved; "
            f"{_kept(folder)}. Fix: free some space, then resume",
        )


def _commit(
    arrays: ocp.AsyncCheckpointer,
    partial: Path,
    sync: Sequence[Path],
    prune: Callable[[], None],
    *,
    step: int,
    notes: dict,
    leaves: dict[str, tuple[str, str]],
) -> None:
    """The background half of a save: wait for the arrays, describe them, rename, prune."""
    folder = partial.parent
    try:
        try:
            faults.hit("mid_save")
        finally:
            arrays.wait_until_finished()
        if not is_first():
            return
        write_record(partial, step=step, notes=notes, leaves=leaves)
        for path in (*sync, partial):
            _flush(path)
        faults.hit("before_commit")
        os.replace(partial, folder / str(step))
        _flush(folder)
    except (OSError, ValueError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = errno.ENOSPC if "RESOURCE_EXHAUSTED" in str(error) else errno.EIO
        code = getattr(error, "errno", None) or full
        raise OSError(code, f"step {step} was not saved in {folder}: {error}; {_kept(folder)}") from error
    faults.hit("after_commit")
    prune()


def _prune(folder: Path, *, keep: int, for_good: int | None) -> None:
    for step in _steps(folder)[:-keep]:
        if for_good is None or step % for_good:
            doomed = folder / f"{step}.pruned{_PARTIAL}"
            os.replace(folder / str(step), doomed)  # whole or swept: never a step with half of its files
            faults.hit("mid_prune")
            shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Have a file's, or a folder's, content on the disk itself."""
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _kept(folder: Path) -> str:
    newest = latest_step(folder)
    return "there is no older step" if newest is None else f"last good step {newest} is kept"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _steps(folder: Path) -> list[int]:
    """Committed steps, oldest first; an unfinished save has another name."""
    if not Path(folder).is_dir():
        return []
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdecimal() and path.is_dir())


def _existing_step(folder: Path, step: int | None) -> int:
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}: run the act that writes it first")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no step {step} in {folder}: it holds {steps}")
    return steps[-1] if step is None else step


def _restore_step(folder: Path, step: int, like: Any) -> Any:
    """Files against the record, form against `like`, then the arrays, then their bits against the record."""
    at = Path(folder).resolve() / str(step)
    try:
        record = read_record(at, files=True)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"step {step} is damaged: {error}") from error
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_wanted_sharding(leaf) or here), like
    )
    with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as arrays:
        with _DamageNamed(step, at):
            leaves = record["leaves"]
            stored = (
                {name: form for name, (form, _) in leaves.items()}
                if leaves is not None
                else _form(arrays.metadata(at / "state").item_metadata.tree)
            )
        _check_form(folder, step, stored, _form(target))
        with _DamageNamed(step, at):
            state = arrays.restore(at / "state", args=ocp.args.StandardRestore(target))
    if leaves is None:
        _to_stderr(f"step {step} in {folder} is of format 1, which has no record: its bytes cannot be checked")
    else:
        _check_bits(step, state, leaves)
    return jax.tree.map(lambda leaf, x: x if _wanted_sharding(leaf) else jnp.array(np.asarray(x)), like, state)


class _DamageNamed:
    """A `with` that tells Orbax's many ways to fail over damaged files as one; no memory and no permission are no damage.

    Its readers raise whatever type they like, plain `Exception` included, so that no list of types would do.
    """

    def __init__(self, step: int, at: Path):
        self._step, self._at = step, at

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        passed_on = not isinstance(error, Exception) or isinstance(error, PermissionError | MemoryError)
        if passed_on or "RESOURCE_EXHAUSTED" in str(error):
            return
        first_line = str(error).strip().split("\n")[0][:200]
        text = f"step {self._step} is damaged: its arrays in {self._at / 'state'} cannot be read ({first_line})"
        raise DamagedCheckpointError(text) from error


def _check_bits(step: int, state: Any, leaves: dict[str, list[str]]) -> None:
    found = {name: f"{high:08x}{low:08x}" for name, (high, low, _) in measure(state).items()}
    wrong = [name for name, (_, bits) in leaves.items() if found[name] != bits]
    if wrong:
        more = f" and at {len(wrong) - 4} more leaves" if len(wrong) > 4 else ""
        raise DamagedCheckpointError(f"step {step} fails its fingerprint at {', '.join(wrong[:4])}{more}")


def _wanted_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where `like` asks the leaf to be; an uncommitted array is nowhere in particular."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None


def _check_form(folder: Path, step: int, stored: dict[str, str], wanted: dict[str, str]) -> None:
    """Compare names, shapes and dtypes first, so that a wrong model is named and not half loaded."""
    wrong = [
        f"{name}: stored {stored.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"step {step} in {folder} is of another model, nothing was loaded. {'; '.join(wrong[:8])}{more}. "
            "Restore it with the configuration that it was saved with"
        )


def _form(tree: Any) -> dict[str, str]:
    """Path → dtype and shape."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(tree)}
