"""What a training loop needs to survive: take up the last good step, save, stop when asked, stop at a number that is none.

    with resumable(run, "sft", state, save_every=20) as kept:
        state = kept.state
        with MetricLog(kept.log_to, "sft", num_steps, show=SHOW, first_step=kept.first_step) as log:
            for step in range(kept.first_step, num_steps):
                batch = kept.batch(step, ...)                          # a pure function of (seed, step)
                state, metrics = train_step(state, batch)
                metrics = kept.check(step, state, metrics, batch)      # raises at NaN; saves what is good, dumps the batch
                log.write(step, metrics, tokens=batch.tokens.size)
                kept.finish(step, state)                               # saves when due; leaves when a signal asked

Checkpoint `n` in `run/state/STAGE` is the state after `n` steps, 0 to n - 1. A run that is killed and started again ends
bit-identical, given the same devices: restoring is exact on any mesh, the steps after it on the same one. `forget` removes
the folder once the stage's result is saved.
"""

import contextlib
import functools
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.runtime import checkpoint, faults
from rlhf_jax.runtime.bad_batch import dump_batch, load_batch
from rlhf_jax.runtime.fingerprint import named_leaves, short
from rlhf_jax.runtime.processes import is_first, largest, meet
from rlhf_jax.runtime.runs import refuse_changes
from rlhf_jax.runtime.sharding import place
from rlhf_jax.runtime.stop import stop_on_signals, watchdog


class Kept(NamedTuple):
    """What `resumable` yields."""

    state: Any
    """Of the last good step, or the one that was passed in."""
    first_step: int
    """The step to go on with."""
    batch: Callable[[int, Any], Any]
    """`batch(step, batch)` returns the batch that the step is to see: the same one, or the dumped one of a replay."""
    check: Callable[..., dict[str, float]]
    """`check(step, state, metrics, batch)` returns the metrics as floats, or raises `FloatingPointError`."""
    finish: Callable[[int, Any], None]
    """`finish(step, state)` after the step was logged; saves when due, raises `SystemExit` when a signal asked to stop."""
    log_to: Path
    """`run/metrics.jsonl`; what it holds is on the disk before a checkpoint is committed."""


@contextlib.contextmanager
def resumable(
    run: Path,
    stage: str,
    state: Any,
    *,
    save_every: int,
    keep: int = 2,
    for_good: int | None = None,
    facts: Mapping | None = None,
    force: bool = False,
    replay: Path | None = None,
    grace: float = 30.0,
    hang_after: float = 1800.0,
    hang_exit_code: int | None = None,
) -> Iterator[Kept]:
    """Make a loop survive; the example stands at the top of this file.

    Args:
      run: the run's folder, locked by the caller (`runs.locked`).
      stage: names the sub-folder of `run/state`, as in the metrics.
      state: step 0; a pytree of arrays. Its shardings are those of the restored state.
      save_every: steps from one save to the next.
      keep, for_good: as `checkpoint.save` has them.
      facts: JSON-able, must be the same when the run goes on (hashes of tokenizer and data, fingerprints of frozen models).
      force: go on although facts differ; every later checkpoint records what differed.
      replay: `bad_batch_N.npz`, which `check` left behind when step N went wrong. That step is played again over that batch,
        `check` says what of batch and metrics is not finite and ends the process: 1 when something is, else 0.
      grace, hang_after, hang_exit_code: as `stop.stop_on_signals` and `stop.watchdog` have them.

    Raises:
      ValueError: the facts differ from those that were saved, or the state at the start of the replayed step is not there.
      DamagedCheckpointError: there are checkpoints, and none is whole.
    """
    folder = Path(run) / "state" / stage
    if save_every < 1:
        raise ValueError(f"save_every {save_every}: fix: a number of steps from 1")
    notes = {"facts": dict(facts or {}), "forced": [], "mesh": _mesh_of(state)}
    first_step, state = _take_up(folder, stage, state, notes, force=force)
    if replay is not None:
        _check_replay(replay, folder, first_step)
    log = Path(run) / "metrics.jsonl"
    with (
        stop_on_signals(grace=grace) as asked,
        watchdog(run, after=hang_after, exit_code=hang_exit_code) as beat,
        checkpoint.writer(folder, keep=keep, for_good=for_good, sync=(log,)) as to,
    ):

        def check(step: int, state: Any, metrics: Mapping[str, jax.Array | float], batch: Any) -> dict[str, float]:
            metrics = faults.hit("after_update", dict(metrics))
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if replay is not None:
                _tell_replay(stage, step, values, batch)
            bad = _not_finite(values)
            if bad:
                saved = _save_untouched(to, folder, step, state, values, notes)
                _refuse_step(run, stage, step, bad, saved, batch)
            return values

        def finish(step: int, state: Any) -> None:
            beat(step)
            by = largest(asked.by() or 0)
            if by or (step + 1) % save_every == 0:
                faults.hit("before_save")
                to.save(step + 1, state, notes)
            if by:
                to.wait()
                _leave(stage, step + 1, short(state), signal.Signals(by), asked.since())

        yield Kept(state, first_step, functools.partial(_enter, replay), check, finish, log)


def forget(run: Path, stage: str) -> None:
    """Remove the checkpoints that only resuming this stage needs."""
    if is_first():
        shutil.rmtree(Path(run) / "state" / stage, ignore_errors=True)


def guarded(step_fn: Callable[..., tuple[Any, dict]], *, state_at: int = 0) -> Callable[..., tuple[Any, dict]]:
    """Wrap `step_fn(..., state, ...) -> (state, metrics)`: a step with any non-finite metric returns the state it was given.

    Adds the metric `update/applied`, 1 or 0, by which `Kept.check` knows that the state is the one before the step. Pure: jit
    the result, donating the state as before.

    Args:
      step_fn: its metrics are scalars; `grad/finite` below 1 counts as non-finite.
      state_at: place of the state among the arguments.
    """

    def step(*args: Any) -> tuple[Any, dict]:
        state, metrics = step_fn(*args)
        finite = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in jax.tree.leaves(metrics)]))
        if "grad/finite" in metrics:
            finite &= metrics["grad/finite"] >= 1.0
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), state, args[state_at])
        return state, {**metrics, "update/applied": finite.astype(jnp.float32)}

    return step


def _take_up(folder: Path, stage: str, state: Any, notes: dict, *, force: bool) -> tuple[int, Any]:
    """Sweep, restore the newest whole step, compare the facts; `notes["forced"]` takes the differences."""
    for name in checkpoint.sweep(folder) if is_first() else ():
        _tell(f"{stage}: removed {name}, which a stopped process left unfinished")
    meet("swept")
    if checkpoint.latest_step(folder) is None:
        return 0, state
    step, state = checkpoint.restore_newest(folder, state)
    for path in checkpoint.set_aside(folder, step) if is_first() else ():
        _tell(f"{stage}: the damaged checkpoint is now {path.name}; delete it when nobody needs it")
    meet("set aside")
    stored = checkpoint.read_notes(folder, step=step)
    notes["forced"] = stored.get("forced", [])
    changed = refuse_changes(f"{folder} step {step}", stored.get("facts", {}), notes["facts"], force=force)
    if changed:
        notes["forced"] = [*notes["forced"], {"step": step, "changed": changed}]
        _tell(f"{stage}: goes on although {'; '.join(changed)}")
    before = stored.get("mesh", notes["mesh"])
    if before != notes["mesh"]:
        _tell(
            f"{stage}: saved on {before}, goes on on {notes['mesh']}: the state is exact, steps may differ in last bits"
        )
    _tell(f"{stage}: resumed after {step} steps, state {short(state)}")
    return step, state


def _mesh_of(state: Any) -> str:
    """`data 4 x tensor 2`: the axes with more than one part of the mesh that the state lies on."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(state))
    sizes = next((s.mesh.shape for s in shardings if isinstance(s, jax.sharding.NamedSharding)), {})
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def _enter(replay: Path | None, step: int, batch: Any) -> Any:
    if replay is None:
        return faults.hit("before_update", batch)
    stored = load_batch(replay, like=batch)
    return jax.tree.map(lambda x, y: place(x, getattr(y, "sharding", None)), stored, batch)


def _not_finite(values: Mapping[str, float]) -> list[str]:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return bad or (["the gradient"] if values.get("grad/finite", 1.0) < 1.0 else [])


def _check_replay(path: Path, folder: Path, first_step: int) -> None:
    """Only the step after the newest checkpoint can be played again."""
    number = re.fullmatch(r"bad_batch_(\d+)\.npz", Path(path).name)
    if number is None or not Path(path).is_file():
        raise ValueError(
            f"{path} is no bad_batch_STEP.npz of a run, nothing was played. Fix: the path from its message"
        )
    if int(number[1]) != first_step:
        raise ValueError(
            f"{path} is the batch of step {number[1]}, the newest checkpoint in {folder} is before step {first_step}: nothing "
            f"was played. Fix: replay in a copy of the run whose checkpoints end at {number[1]}"
        )


def _tell_replay(stage: str, step: int, values: Mapping[str, float], batch: Any) -> None:
    """What is not finite in a step that was played again, and the end of the process."""
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(batch)}
    rows = {n: np.argwhere(~np.isfinite(x))[:4].tolist() for n, x in leaves.items() if x.dtype.kind in "fcV"}
    bad = [f"batch {name} at {places}" for name, places in rows.items() if places]
    bad += _not_finite(values)
    for name, value in sorted(values.items()):
        _tell(f"  {name:<28} {value:.6g}")
    _tell(f"{stage} step {step} replayed, nothing was written. Not finite: {'; '.join(bad) or 'nothing'}")
    raise SystemExit(1 if bad else 0)


def _save_untouched(to, folder: Path, step: int, state: Any, values: Mapping[str, float], notes: dict) -> str:
    """Save the state before the bad step, if it is at hand; returns what to tell."""
    to.wait()
    newest = checkpoint.latest_step(folder)
    untouched = values.get("update/applied", values.get("grad/finite", 1.0)) == 0.0
    if untouched and newest != step:
        to.save(step, state, notes)
        to.wait()
        newest = step
    if newest is None:
        return "no step was saved yet"
    return f"the state after {newest} steps is saved in {folder}"


def _refuse_step(run: Path, stage: str, step: int, bad: list[str], saved: str, batch: Any) -> None:
    path = dump_batch(run, step, batch)
    raise FloatingPointError(
        f"{stage} step {step}: not finite: {', '.join(bad)}. This step was not logged; {saved}; its batch is in {path}. "
        f"Fix: see what is wrong with it by the same command with --resume --replay {path}; then lower the learning rate or "
        "take the row out"
    )


def _leave(stage: str, steps: int, fingerprint: str, by: signal.Signals, seconds: float) -> None:
    saved = f"saved {stage} after {steps} steps in {seconds:.1f} s, state {fingerprint}"
    _tell(f"{by.name}: {saved}. Resume: same command with --resume")
    raise SystemExit(128 + by)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
