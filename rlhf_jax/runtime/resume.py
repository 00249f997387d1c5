"""What a training loop needs to survive: take up the last good step, save, stop when asked, stop at a number that is none.

    with resumable(run, "sft", state, save_every=20) as kept:
        state = kept.state
        with MetricLog(run / "metrics.jsonl", "sft", num_steps, show=SHOW, first_step=kept.first_step) as log:
            for step in range(kept.first_step, num_steps):
                batch = ...                                            # a pure function of (seed, step)
                state, metrics = train_step(state, batch)
                metrics = kept.check(step, state, metrics, batch)      # raises at NaN; saves what is good, dumps the batch
                log.write(step, metrics, tokens=batch.tokens.size)
                kept.finish(step, state)                               # saves when due; leaves when a signal asked

Checkpoint `n` in `run/state/STAGE` is the state after `n` steps, 0 to n - 1. A run that is killed and started again ends
bit-identical, given the same devices: restoring is exact on any mesh, the steps after it on the same one.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.runtime import checkpoint, faults
from rlhf_jax.runtime.bad_batch import dump_batch
from rlhf_jax.runtime.fingerprint import short
from rlhf_jax.runtime.runs import refuse_changes
from rlhf_jax.runtime.stop import stop_on_signals, watchdog


class Kept(NamedTuple):
    """What `resumable` yields."""

    state: Any
    """Of the last good step, or the one that was passed in."""
    first_step: int
    """The step to go on with."""
    check: Callable[..., dict[str, float]]
    """`check(step, state, metrics, batch)` returns the metrics as floats, or raises `FloatingPointError`."""
    finish: Callable[[int, Any], None]
    """`finish(step, state)` after the step was logged; saves when due, raises `SystemExit` when a signal asked to stop."""


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
      grace, hang_after, hang_exit_code: as `stop.stop_on_signals` and `stop.watchdog` have them.

    Raises:
      ValueError: the facts differ from those that were saved.
      DamagedCheckpointError: there are checkpoints, and none is whole.
    """
    folder = Path(run) / "state" / stage
    if save_every < 1:
        raise ValueError(f"save_every {save_every}: fix: a number of steps from 1")
    notes = {"facts": dict(facts or {}), "forced": []}
    first_step, state = _take_up(folder, stage, state, notes, force=force)
    log = Path(run) / "metrics.jsonl"
    with (
        stop_on_signals(grace=grace) as asked,
        watchdog(run, after=hang_after, exit_code=hang_exit_code) as beat,
        checkpoint.writer(folder, keep=keep, for_good=for_good, sync=(log,)) as to,
    ):

        def check(step: int, state: Any, metrics: Mapping[str, jax.Array | float], batch: Any) -> dict[str, float]:
            metrics = faults.hit("after_update", dict(metrics))
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad or values.get("grad/finite", 1.0) < 1.0:
                saved = _save_untouched(to, folder, step, state, values, notes)
                _refuse_step(run, stage, step, bad, saved, batch)
            return values

        def finish(step: int, state: Any) -> None:
            beat(step)
            by = asked.by()
            if by or (step + 1) % save_every == 0:
                faults.hit("before_save")
                to.save(step + 1, state, notes)
            if by:
                to.wait()
                _leave(stage, step + 1, short(state), by, asked.since())

        yield Kept(state, first_step, check, finish)


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
    if jax.process_index() == 0:
        for name in checkpoint.sweep(folder):
            _tell(f"{stage}: removed {name}, which a stopped process left unfinished")
    if checkpoint.latest_step(folder) is None:
        return 0, state
    step, state = checkpoint.restore_newest(folder, state)
    for path in checkpoint.set_aside(folder, step) if jax.process_index() == 0 else ():
        _tell(f"{stage}: the damaged checkpoint is now {path.name}; delete it when nobody needs it")
    stored = checkpoint.read_notes(folder, step=step)
    notes["forced"] = stored.get("forced", [])
    changed = refuse_changes(f"{folder} step {step}", stored.get("facts", {}), notes["facts"], force=force)
    if changed:
        notes["forced"] = [*notes["forced"], {"step": step, "changed": changed}]
        _tell(f"{stage}: goes on although {'; '.join(changed)}")
    _tell(f"{stage}: resumed after {step} steps, state {short(state)}")
    return step, state


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
    what = ", ".join(bad) or "the gradient"
    raise FloatingPointError(
        f"{stage} step {step}: not finite: {what}. This step was not logged; {saved}; its batch is in {path}. "
        "Fix: replay that batch, lower the learning rate or take the row out"
    )


def _leave(stage: str, steps: int, fingerprint: str, by: Any, seconds: float) -> None:
    _tell(f"{by.name}: saved {stage} after {steps} steps in {seconds:.1f} s, state {fingerprint}. Resume: same command")
    raise SystemExit(128 + by)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
