"""Faults on demand: the grammar, each action, and nothing at all without a rule."""

import errno
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runtime import faults
from rlhf_jax.runtime.faults import hit, injected, parse


def test_rules_are_read():
    rules = parse("mid_save@3=kill9, reward=nan,log_write@1=sleep:0.5,")
    assert [(rule.point, rule.visit, rule.text) for rule in rules] == [
        ("mid_save", 3, "mid_save@3=kill9"),
        ("reward", None, "reward=nan"),
        ("log_write", 1, "log_write@1=sleep:0.5"),
    ]
    assert parse("") == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mid_save", r"rule 'mid_save' is not point=action or point@n=action; fix: for example mid_save@3=kill9"),
        ("=kill9", "is not point=action"),
        ("a@0=raise", "'0' is no visit; fix: a whole number from 1"),
        ("a@x=raise", "'x' is no visit"),
        ("a@=raise", "'' is no visit"),
        ("a=explode", "no action 'explode'; fix: one of kill9, term, raise, enospc, nan, sleep:seconds"),
        ("a=raise:now", "no action 'raise:now'"),
        ("a=sleep", "'' are no seconds; fix: for example sleep:0.5"),
        ("a=sleep:-1", "'-1' are no seconds"),
        ("ok=raise,a=sleep:nan", "RLHF_JAX_FAULTS: rule 'a=sleep:nan': 'nan' are no seconds"),
    ],
)
def test_what_cannot_be_read_is_told(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)


def test_without_rules_a_visit_gives_the_value_back():
    value = object()
    assert hit("reward", value) is value
    assert faults._visits == {}


def test_only_the_named_visit_of_the_named_point():
    with injected("here@2=raise") as visits:
        hit("here")
        hit("there")
        with pytest.raises(faults.InjectedFaultError, match=r"injected: here@2=raise \(visit 2\)"):
            hit("here")
        hit("here")
        assert visits == {"here": 3, "there": 1}
    hit("here")


def test_no_space_and_sleep():
    with injected("a=enospc,b=sleep:0.05"):
        with pytest.raises(OSError, match="No space left on device") as error:
            hit("a")
        assert error.value.errno == errno.ENOSPC
        start = time.monotonic()
        assert hit("b", 5) == 5
        assert time.monotonic() - start >= 0.05


def test_nan_enters_every_float_and_nothing_else():
    value = {
        "f": 1.0,
        "i": 3,
        "np": np.ones((2, 2), np.float32),
        "jax": jnp.ones(3, jnp.bfloat16),
        "t": (jnp.arange(2), "x"),
    }
    with injected("reward@1=nan"):
        got = hit("reward", value)
    assert np.isnan(got["f"])
    assert got["i"] == 3
    assert got["t"][1] == "x"
    for name in ("np", "jax"):
        assert np.isnan(np.asarray(got[name], np.float32)).reshape(-1).tolist() == [True] + [False] * (
            value[name].size - 1
        )
    assert got["jax"].dtype == jnp.bfloat16
    assert not np.isnan(value["np"]).any()


def run(code, spec):
    environment = {**os.environ, "RLHF_JAX_FAULTS": spec}
    command = [sys.executable, "-c", f"from rlhf_jax.runtime.faults import hit\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_environment_sets_them():
    killed = run("for _ in range(3): print(hit('a', 'x'), flush=True)", "a@2=kill9")
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout == "x\n"
    assert killed.stderr == "injected: a@2=kill9 (visit 2)\n"
    missed = run("hit('mid_save')", "mid_svae=kill9,mid_save@2=raise")
    assert missed.returncode == 0
    assert "never reached: mid_svae=kill9, mid_save@2=raise; visited: {'mid_save': 1}" in missed.stderr
