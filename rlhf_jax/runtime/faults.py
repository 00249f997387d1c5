"""Faults on demand: what a test, or the author of a reward function, does to a run to see it survive.

    RLHF_JAX_FAULTS="mid_save@3=kill9" python experiments/sft.py --run runs/mine

    spec   = rule {"," rule}
    rule   = point ["@" n] "=" action          at the n-th visit of this process (from 1); without n at every visit
    action = "kill9"        SIGKILL to this process: no clean-up code runs
           | "term"         SIGTERM to this process, as a scheduler sends it
           | "raise"        `InjectedFaultError`
           | "enospc"       `OSError`: no space left on device
           | "nan"          NaN in the first element of every float that passes the point
           | "sleep:" s     sleep s seconds

A point is any name that some code visits by `hit(name)`; rules of points that were never visited are told when the process
ends. The package visits `after_update`, `log_write`, `before_save`, `mid_save`, `before_commit`, `after_commit` and
`mid_prune`; a loop adds its own (`before_update`, `reward`). Without the variable a visit is one test of an empty tuple.
"""

import atexit
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VARIABLE = "RLHF_JAX_FAULTS"


class InjectedFaultError(RuntimeError):
    """What the action `raise` raises."""


class Rule(NamedTuple):
    """One fault: at which visit of which point to do what."""

    point: str
    visit: int | None
    text: str
    action: Callable[[str, Any], Any]


def hit(point: str, value: Any = None) -> Any:
    """Visit a point: returns `value`, unless a rule says otherwise. For the host only, not inside `jit`."""
    if not _rules:
        return value
    _visits[point] = _visits.get(point, 0) + 1
    for rule in _rules:
        if rule.point == point and rule.visit in (None, _visits[point]):
            value = rule.action(f"{rule.text} (visit {_visits[point]})", value)
    return value


def parse(spec: str) -> tuple[Rule, ...]:
    """Read a specification in the grammar above.

    Raises:
      ValueError: what cannot be read, with the rule it stands in.
    """
    return tuple(_rule(text.strip()) for text in spec.split(",") if text.strip())


@contextlib.contextmanager
def injected(spec: str) -> Iterator[dict[str, int]]:
    """Rules for the body of a `with`, in place of those of the environment; yields point → visits, counted anew."""
    global _rules, _visits
    before = _rules, _visits
    _rules, _visits = parse(spec), {}
    try:
        yield _visits
    finally:
        _rules, _visits = before


def _rule(text: str) -> Rule:
    where = f"{VARIABLE}: rule {text!r}"
    place, equals, action = text.partition("=")
    point, at, visit = place.partition("@")
    if not (point and equals and action):
        raise ValueError(f"{where} is not point=action or point@n=action; fix: for example mid_save@3=kill9")
    if at and not (visit.isdecimal() and int(visit) >= 1):
        raise ValueError(f"{where}: {visit!r} is no visit; fix: a whole number from 1, or leave @ away for every visit")
    name, colon, argument = action.partition(":")
    if name == "sleep":
        seconds = _seconds(where, argument)
        return Rule(point, int(visit) if at else None, text, lambda _, value: (time.sleep(seconds), value)[1])
    if name not in _ACTIONS or colon:
        known = ", ".join([*_ACTIONS, "sleep:seconds"])
        raise ValueError(f"{where}: no action {action!r}; fix: one of {known}")
    return Rule(point, int(visit) if at else None, text, _ACTIONS[name])


def _seconds(where: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ValueError(f"{where}: {text!r} are no seconds; fix: for example sleep:0.5")
    return seconds


def _kill9(text: str, value: Any) -> Any:
    sys.stderr.write(f"injected: {text}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    return value


def _term(text: str, value: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return value


def _raise(text: str, value: Any) -> Any:
    raise InjectedFaultError(f"injected: {text}")


def _enospc(text: str, value: Any) -> Any:
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected: {text})")


def _nan(text: str, value: Any) -> Any:
    """NaN in the first element of every float of a pytree: Python numbers, numpy and device arrays."""
    return jax.tree.map(_nan_leaf, value)


def _nan_leaf(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return float("nan")
    if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
        return leaf
    changed = np.array(leaf)
    changed.reshape(-1)[0] = np.nan
    return changed if isinstance(leaf, np.ndarray) else jax.device_put(changed, leaf.sharding)


_ACTIONS = {"kill9": _kill9, "term": _term, "raise": _raise, "enospc": _enospc, "nan": _nan}

_visits: dict[str, int] = {}
_rules: tuple[Rule, ...] = parse(os.environ.get(VARIABLE, ""))


@atexit.register
def _tell_unvisited() -> None:
    missed = [rule.text for rule in _rules if _visits.get(rule.point, 0) < (rule.visit or 1)]
    if missed:
        sys.stderr.write(f"{VARIABLE}: never reached: {', '.join(missed)}; visited: {dict(sorted(_visits.items()))}\n")
