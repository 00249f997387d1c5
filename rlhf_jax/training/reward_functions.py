"""Rewards that are Python: `def reward(prompts, completions, **columns) -> list[float]`, called between two compiled parts.

    generation = sample(state.params["policy"], prompts, key)
    scored = score_completions({"exact": exact_number}, texts, completions, columns={"answer": answers}, time_limit=10.0)
    scores = fill_missing(weighted_sum(scored.scores, weights, scored.mask), scored.rows, group_size=group_size)
    experience, metrics = experience_fn(state.params, ref_params, generation, scores, state.kl_coef)
    state, learned = update(state, learn_from(experience, scored.rows), None, metrics["objective/kl"], key)

**Failures.** A function that raises, runs longer than its time limit, or returns another number of values, None, or what is
no finite number, stops the run by a `RewardError`: before the update, so that the state is whole and can be saved. When the
call of a batch fails as a whole, its completions are tried one by one to find the one at fault. With `mask_failures`, such
completions take no part in the update, are counted in the metrics, and the run goes on; it stops where none is left.

**Time limit.** It is an alarm (`SIGALRM`) in the main thread, not a thread that would run on behind the loop: the call
itself is interrupted, in Python code, regular expressions, sleeping and waiting for a network alike, and nothing is left
behind. What it cannot interrupt is one call into compiled code that never comes back; give such a function a process of its
own (`reward_process.own_process`), which is killed.
"""

import contextlib
import functools
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from rlhf_jax.types import Experience

RewardFn: TypeAlias = Callable[..., Sequence[float]]
"""`reward(prompts, completions, **columns) -> one finite number per completion`; every column is a list beside them."""

NUM_LIMITS = 3
"""Trying completions one by one ends after so many time limits."""


class RewardError(RuntimeError):
    """A reward function failed, and nothing was updated; `__cause__` is what it raised."""


class Scored(NamedTuple):
    """What the functions said of B completions, one row a function, in the order in which they were given."""

    scores: np.ndarray
    """float32 `[N, B]`, 0 where there is none."""
    mask: np.ndarray
    """bool `[N, B]`, False where a function failed."""
    metrics: dict[str, float]
    """By name: `reward/NAME` and `reward/NAME_std` over the completions that it scored, `reward/NAME_failed` counts others."""

    @property
    def rows(self) -> np.ndarray:
        """bool `[B]`: completions that every function scored."""
        return self.mask.all(axis=0)


class _Batch(NamedTuple):
    prompts: list[str]
    completions: list[str]
    columns: dict[str, list]

    def row(self, i: int) -> "_Batch":
        columns = {name: values[i : i + 1] for name, values in self.columns.items()}
        return _Batch(self.prompts[i : i + 1], self.completions[i : i + 1], columns)


class _Outcome(NamedTuple):
    """Of one call: values, None where a row has none, and what is wrong; `problem` with the call, `problems` with rows."""

    values: list[float | None]
    problems: dict[int, str]
    problem: str | None = None
    cause: BaseException | None = None


def score_completions(
    rewards: Mapping[str, RewardFn],
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    columns: Mapping[str, Sequence] | None = None,
    ids: Sequence[str | int] | None = None,
    time_limit: float | None = 60.0,
    mask_failures: bool = False,
    where: str = "",
) -> Scored:
    """Call every function once with the whole batch.

    Args:
      rewards: name to function.
      prompts, completions: B texts each; a prompt with several samples stands there several times.
      columns: further arguments by name, B values each: the answers of the data set.
      ids: names of the prompts for messages; their place in the batch if None.
      time_limit: seconds for one call; None waits for ever, and is what other threads than the main one can have.
      mask_failures: go on without completions that have no score. The default is to stop.
      where: begins the message: `"grpo step 7"`.

    Raises:
      RewardError: a function failed and failures stop the run, or no completion has all its scores. The message names the
        function, the completion's place, its prompt's id and both texts, shortened.
      ValueError: arguments of unequal length, or a time limit outside the main thread.
    """
    batch = _Batch(list(prompts), list(completions), {name: list(v) for name, v in (columns or {}).items()})
    num_rows = len(batch.completions)
    sizes = {"prompts": len(batch.prompts), **{name: len(v) for name, v in batch.columns.items()}}
    sizes |= {} if ids is None else {"ids": len(ids)}
    wrong = [f"{name} has {size}" for name, size in sizes.items() if size != num_rows]
    if wrong or not num_rows or not rewards:
        what = ", ".join(wrong) or "there is nothing to score"
        raise ValueError(f"{num_rows} completions, {len(rewards)} rewards: {what}. Fix: one entry per completion")
    if time_limit is not None and threading.current_thread() is not threading.main_thread():
        raise ValueError("a time limit is an alarm of the main thread. Fix: score there, or time_limit=None")
    tell = functools.partial(_message, batch, range(num_rows) if ids is None else ids, where)
    scores, mask, metrics = [], [], {}
    for name, function in rewards.items():
        outcome = _score(function, batch, time_limit, stop=not mask_failures)
        if (outcome.problem or outcome.problems) and not mask_failures:
            raise RewardError(tell(name, function, outcome)) from outcome.cause
        values = np.array([0.0 if value is None else value for value in outcome.values], np.float32)
        there = np.array([value is not None for value in outcome.values])
        if not there.any():
            raise RewardError(tell(name, function, outcome)) from outcome.cause
        kept = values[there].astype(np.float64)
        metrics |= {f"reward/{name}": float(kept.mean()), f"reward/{name}_std": float(kept.std())}
        metrics[f"reward/{name}_failed"] = float((~there).sum())
        scores.append(values)
        mask.append(there)
    scored = Scored(np.stack(scores), np.stack(mask), metrics)
    if not scored.rows.any():
        raise RewardError(
            f"{where + ': ' if where else ''}no completion has all of {list(rewards)}. Nothing was updated"
        )
    return scored


def learn_from(experience: Experience, rows: jax.Array | np.ndarray) -> Experience:
    """The experience without the rows `[B]` that are False: no token of theirs is in the loss.

    Their scores should move no baseline (`functional.fill_missing`).
    """
    return experience.replace(mask=experience.mask & rows[:, None])


def _score(function: RewardFn, batch: _Batch, limit: float | None, *, stop: bool) -> _Outcome:
    """One call for all; when it fails as a whole, one for each, up to the first that fails where failures stop."""
    whole = _call(function, batch, limit)
    num_rows = len(batch.completions)
    if whole.problem is None or num_rows == 1:
        problems = {0: whole.problem} if whole.problem else whole.problems
        return _Outcome(whole.values, problems, None, whole.cause)
    values, problems, cause = [None] * num_rows, {}, whole.cause
    start = time.monotonic()
    for i in range(num_rows):
        if limit is not None and time.monotonic() - start > NUM_LIMITS * limit:
            problems |= {row: f"{whole.problem}; not reached one by one" for row in range(i, num_rows)}
            break
        alone = _call(function, batch.row(i), limit)
        values[i] = alone.values[0]
        if values[i] is None:
            problems[i] = alone.problem or alone.problems[0]
            cause = alone.cause or cause
            if stop:
                break
    return _Outcome(values, problems, whole.problem if stop else None, cause)


def _call(function: RewardFn, batch: _Batch, limit: float | None) -> _Outcome:
    """One call, with whatever goes wrong in it as text."""
    none: list[float | None] = [None] * len(batch.completions)
    attempt, result = _Attempt(), None
    with attempt, _alarm(limit) as rung:
        result = function(batch.prompts, batch.completions, **batch.columns)
        if isinstance(result, Iterable) and not isinstance(result, str):
            result = list(result)
    if rung:
        return _Outcome(none, {}, f"still ran after {limit:g} s ({_place(rung[0])})", attempt.error)
    if attempt.error is not None:
        *_, last = traceback.walk_tb(attempt.error.__traceback__)
        kind = type(attempt.error).__name__
        return _Outcome(none, {}, f"raised {kind}: {attempt.error} ({_place(last)})", attempt.error)
    if not isinstance(result, list):
        returned = "None" if result is None else f"a {type(result).__name__}"
        return _Outcome(none, {}, f"returned {returned} in place of a list")
    if len(result) != len(none):
        return _Outcome(none, {}, f"returned {len(result)} values for {len(none)} completions")
    values = [_number(value) for value in result]
    problems = {i: f"returned {_excerpt(result[i])}" for i, value in enumerate(values) if value is None}
    return _Outcome(values, problems)


def _number(value: Any) -> float | None:
    """As a float, if it is one number that float32 can hold."""
    array = np.asarray(value)
    if array.shape or array.dtype.kind not in "biuf":
        return None
    number = float(array)
    return number if abs(number) <= float(np.finfo(np.float32).max) and math.isfinite(number) else None


class _Attempt:
    """Foreign code that may fail: its error is handed back. An interrupt and an exit are not held up."""

    error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, Exception)


@contextlib.contextmanager
def _alarm(seconds: float | None) -> Iterator[list[tuple[FrameType, int]]]:
    """Raise `TimeoutError` in the body after so many seconds, and again and again should the body swallow it.

    Yields a list that then holds where the body stood.
    """
    rung: list[tuple[FrameType, int]] = []
    if seconds is None:
        yield rung
        return
    armed = [True]

    def ring(number: int, frame: FrameType) -> None:
        if armed:
            rung.append((frame, frame.f_lineno))
            raise TimeoutError(f"the time limit of {seconds:g} s is over")

    before = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 1.0))
    try:
        yield rung
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _place(at: tuple[FrameType, int]) -> str:
    frame, line = at
    return f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"


def _name(function: RewardFn) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__)


def _excerpt(value: Any, length: int = 60) -> str:
    text = value if isinstance(value, str) else repr(value)
    if len(text) > 2 * length:
        text = f"{text[:length]} … {text[-length:]}"
    return repr(text) if isinstance(value, str) else text


def _message(
    batch: _Batch, ids: Sequence[str | int], where: str, name: str, function: RewardFn, outcome: _Outcome
) -> str:
    """What failed, for which completion, and what to do."""
    first = min(outcome.problems, default=None)
    what = outcome.problem if first is None else outcome.problems[first]
    row = 0 if first is None else first
    num_rows = len(batch.completions)
    place = f"row {row} of {num_rows}, prompt {ids[row]}"
    if first is None:
        place = f"all {num_rows} completions together and for none alone; the first is prompt {ids[0]}"
    elif len(outcome.problems) > 1:
        place += f" (the first of {len(outcome.problems)})"
    return (
        f"{where + ': ' if where else ''}reward {name!r} ({_name(function)}) {what} for {place}: "
        f"{_excerpt(batch.prompts[row])}, completion {_excerpt(batch.completions[row])}. Nothing was updated. Fix: return one "
        "finite number per completion in time; or mask_failures=True, which leaves such rows out of the update and counts them"
    )
