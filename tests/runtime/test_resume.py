"""`resumable` inside one process: what is compared, refused, forced and guarded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.resume import guarded, resumable

START = {"w": jnp.arange(3, dtype=jnp.float32)}


def steps(run, *, until, facts=None, force=False, save_every=2):
    with resumable(run, "sft", START, save_every=save_every, facts=facts, force=force) as kept:
        state = kept.state
        for step in range(kept.first_step, until):
            state = {"w": state["w"] + 1}
            kept.check(step, state, {"loss": jnp.float32(step)}, {})
            kept.finish(step, state)
    return kept.first_step, state


def test_the_last_saved_step_is_taken_up(tmp_path, capsys):
    assert steps(tmp_path, until=5)[0] == 0
    first_step, state = steps(tmp_path, until=7)
    assert first_step == 4
    np.testing.assert_array_equal(state["w"], START["w"] + 7)
    assert "sft: resumed after 4 steps, state " in capsys.readouterr().err
    with pytest.raises(ValueError, match="save_every 0"):
        steps(tmp_path, until=7, save_every=0)


def test_other_facts_are_refused_or_recorded(tmp_path, capsys):
    facts = {"tokenizer": "9f2c", "ref": "41aa"}
    steps(tmp_path, until=2, facts=facts)
    changed = {**facts, "tokenizer": "77d0"}
    with pytest.raises(
        ValueError, match=r"state/sft step 2 was started with .*tokenizer: '9f2c' -> '77d0'\. Resume with"
    ):
        steps(tmp_path, until=4, facts=changed)
    assert steps(tmp_path, until=4, facts=changed, force=True)[0] == 2
    assert "sft: goes on although tokenizer: '9f2c' -> '77d0'" in capsys.readouterr().err
    assert steps(tmp_path, until=6, facts=changed)[0] == 4
    notes = checkpoint.read_notes(tmp_path / "state" / "sft")
    assert notes == {"facts": changed, "forced": [{"step": 2, "changed": ["tokenizer: '9f2c' -> '77d0'"]}]}


def test_a_bad_metric_after_an_applied_update_saves_nothing_new(tmp_path):
    """The state is no longer the one before the step, so the last regular save is what counts."""
    with resumable(tmp_path, "sft", START, save_every=2) as kept:
        kept.finish(0, START)
        kept.finish(1, START)
        with pytest.raises(FloatingPointError, match=r"step 2: not finite: kl. .* after 2 steps is saved") as error:
            kept.check(2, START, {"kl": jnp.nan, "loss": 1.0}, {"x": np.ones(2)})
        assert str(tmp_path / "bad_batch_2.npz") in str(error.value)
        with pytest.raises(FloatingPointError, match="not finite: the gradient"):
            kept.check(2, START, {"grad/finite": 0.75}, {"x": np.ones(2)})
        assert checkpoint.latest_step(tmp_path / "state" / "sft") == 2
        with pytest.raises(FloatingPointError, match="after 3 steps is saved"):
            kept.check(3, START, {"grad/finite": 0.0}, {"x": np.ones(2)})
        assert checkpoint.latest_step(tmp_path / "state" / "sft") == 3


def test_a_guarded_step_returns_what_it_was_given():
    def step(frozen, state, x):
        return {"w": state["w"] + x}, {"loss": x, "grad/finite": jnp.where(x > 5, 0.5, 1.0)}

    run = jax.jit(guarded(step, state_at=1), donate_argnums=1)
    for x, applied in ((2.0, 1.0), (jnp.nan, 0.0), (6.0, 0.0)):
        state = {"w": jnp.array([-0.0, 1.0, jnp.inf])}
        before = np.asarray(state["w"]).copy()
        new, metrics = run(None, state, jnp.float32(x))
        assert float(metrics["update/applied"]) == applied
        wanted = before + np.float32(2) if applied else before
        assert np.asarray(new["w"]).tobytes() == wanted.tobytes()
