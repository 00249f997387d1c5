"""`resumable` inside one process: what is compared, refused, forced and guarded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.bad_batch import dump_batch
from rlhf_jax.runtime.resume import guarded, resumable
from rlhf_jax.runtime.sharding import make_mesh, replicate

START = {"w": jnp.arange(3, dtype=jnp.float32)}
STEP = jax.jit(guarded(lambda state, batch: ({"w": state["w"] + 1}, {"loss": batch["x"].sum()})))


def steps(run, *, until, save_every=2, bad=None, **options):
    with resumable(run, "sft", START, save_every=save_every, **options) as kept:
        state = kept.state
        for step in range(kept.first_step, until):
            batch = kept.batch(step, {"x": np.array([1, jnp.nan if step == bad else 2], np.float32)})
            state, metrics = STEP(state, batch)
            kept.check(step, state, metrics, batch)
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
        ValueError, match=r"state/sft step 2 was started with .*tokenizer: '9f2c' -> '77d0'\. Fix: resume with"
    ):
        steps(tmp_path, until=4, facts=changed)
    assert steps(tmp_path, until=4, facts=changed, force=True)[0] == 2
    assert "sft: goes on although tokenizer: '9f2c' -> '77d0'" in capsys.readouterr().err
    assert steps(tmp_path, until=6, facts=changed)[0] == 4
    notes = checkpoint.read_notes(tmp_path / "state" / "sft")
    forced = [{"step": 2, "changed": ["tokenizer: '9f2c' -> '77d0'"]}]
    assert notes == {"facts": changed, "forced": forced, "mesh": "one device"}


def test_another_mesh_is_told(tmp_path, capsys):
    """The state is the same, the order in which devices add is not; the same mesh, and older checkpoints, say nothing."""
    folder, mesh = tmp_path / "state" / "sft", make_mesh()
    steps(tmp_path, until=2)
    with resumable(tmp_path, "sft", replicate(START, mesh), save_every=1) as kept:
        np.testing.assert_array_equal(kept.state["w"], START["w"] + 2)
        kept.finish(2, kept.state)
    assert "sft: saved on one device, goes on on data 2: the state is exact, steps may" in capsys.readouterr().err
    with resumable(tmp_path, "sft", replicate(START, mesh), save_every=1) as kept:
        pass
    checkpoint.save(folder, 9, START, notes={"facts": {}, "forced": []})
    steps(tmp_path, until=9)
    assert "saved on" not in capsys.readouterr().err


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


def test_the_bad_batch_is_played_again(tmp_path, capsys):
    """It ends the process, 1 with what is wrong, 0 when nothing is, and writes nothing."""
    with pytest.raises(
        FloatingPointError, match=r"after 3 steps is saved.*--resume --replay .*bad_batch_3.npz"
    ) as error:
        steps(tmp_path, until=5, bad=3)
    path = tmp_path / "bad_batch_3.npz"
    assert str(path) in str(error.value)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        steps(tmp_path, until=5, replay=path)
    assert end.value.code == 1
    assert "sft step 3 replayed, nothing was written. Not finite: batch x at [[1]]; loss\n" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    dump_batch(tmp_path, 3, {"x": np.ones(2, np.float32)})
    with pytest.raises(SystemExit) as end:
        steps(tmp_path, until=5, replay=path)
    assert end.value.code == 0
    with pytest.raises(ValueError, match=r"is no bad_batch_STEP.npz of a run, nothing was played. Fix"):
        steps(tmp_path, until=5, replay=tmp_path / "bad_batch_9.npz")
    steps(tmp_path, until=5)
    with pytest.raises(
        ValueError, match=r"of step 3, the newest checkpoint in .* is before step 4: nothing was played. Fix"
    ):
        steps(tmp_path, until=5, replay=path)


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
