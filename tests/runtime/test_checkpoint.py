"""Checkpoints: bit-equal, onto other devices, never overwritten, never half loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.models.architecture import param_specs
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.sharding import batch_sharding, make_mesh, named_shardings
from rlhf_jax.training.ppo import init_ppo_state
from rlhf_jax.types import TrainState

SMALL = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.zeros((), jnp.bfloat16)}


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def ppo_state():
    """A state of random bits in every part, the optimiser's included."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    form = jax.eval_shape(lambda: init_ppo_state(tiny.init_params(), tiny.init_critic(), optimizer))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray((100 * rng.normal(size=x.shape)).astype(x.dtype)), form)


def test_a_ppo_state_comes_back_bit_equal(tmp_path):
    state = ppo_state()
    checkpoint.save(tmp_path / "ppo", 7, state, notes={"tokenizer": "9f2c", "shape": [1, 2]})
    assert_same_bits(state, checkpoint.restore(tmp_path / "ppo", jax.eval_shape(lambda: state)))
    assert_same_bits(state, checkpoint.restore(tmp_path / "ppo", state, step=7))
    assert checkpoint.read_notes(tmp_path / "ppo") == {"tokenizer": "9f2c", "shape": [1, 2]}


def test_a_train_state_is_restored_onto_two_devices(tmp_path):
    params = ppo_state().params["policy"]
    optimizer = optax.adam(1e-3)
    state = TrainState(jnp.asarray(3, jnp.int32), params, optimizer.init(params))
    checkpoint.save(tmp_path / "sft", 3, state)
    # Rotary heads and the vocabulary of 17 do not split in two; the width of 16 does.
    shardings = named_shardings(param_specs(tiny.CONFIG), make_mesh(fsdp=2))
    spread = jax.device_put(params, shardings)
    like = state.replace(params=spread, opt_state=optimizer.init(spread))
    restored = checkpoint.restore(tmp_path / "sft", like)
    assert_same_bits(state, restored)
    for tree in (restored.params, restored.opt_state[0].mu):
        assert tree["embedding"].sharding.is_equivalent_to(shardings["embedding"], 2)
        assert len(tree["layers"]["gate"].sharding.device_set) == 2
    checkpoint.save(tmp_path / "sft", 4, restored)  # and from two devices back to one
    assert_same_bits(state, checkpoint.restore(tmp_path / "sft", jax.eval_shape(lambda: state)))


def test_restored_without_a_sharding_jit_may_move_it(tmp_path):
    """Saved on two devices or on one: what comes back goes into a program on any mesh."""
    rows = batch_sharding(make_mesh())
    checkpoint.save(tmp_path / "c", 0, {"w": jax.device_put(SMALL["w"], rows)})
    restored = checkpoint.restore(tmp_path / "c", {"w": SMALL["w"]})
    assert not restored["w"].committed
    out = jax.jit(lambda a, b: a + b)(jax.device_put(SMALL["w"], rows), restored["w"])
    np.testing.assert_array_equal(out, 2 * SMALL["w"])


def test_two_steps_are_kept_and_none_is_overwritten(tmp_path):
    for step in (1, 2, 5):
        checkpoint.save(tmp_path / "c", step, jax.tree.map(lambda x, step=step: x + step, SMALL))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "5"]
    for step in (5, 4):
        with pytest.raises(FileExistsError, match=f"holds step 5, so step {step} was not saved.*never overwritten"):
            checkpoint.save(tmp_path / "c", step, SMALL)
    assert float(checkpoint.restore(tmp_path / "c", SMALL)["w"][0, 0]) == 5
    assert float(checkpoint.restore(tmp_path / "c", SMALL, step=2)["w"][0, 0]) == 2


def test_an_unfinished_save_is_ignored_and_then_swept(tmp_path):
    checkpoint.save(tmp_path / "c", 1, SMALL)
    orphan = tmp_path / "c" / "9.orbax-checkpoint-tmp-3"
    (orphan / "state").mkdir(parents=True)
    assert checkpoint.latest_step(tmp_path / "c") == 1
    checkpoint.restore(tmp_path / "c", SMALL)
    checkpoint.save(tmp_path / "c", 2, SMALL)
    assert not orphan.exists()


def test_what_is_not_there_is_named(tmp_path):
    assert checkpoint.latest_step(tmp_path / "none") is None
    none = tmp_path / "none"
    for read in (lambda: checkpoint.restore(none, SMALL), lambda: checkpoint.read_notes(none)):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*none: run the act that writes it first"):
            read()
    assert not (tmp_path / "none").exists()
    checkpoint.save(tmp_path / "c", 1, SMALL)
    with pytest.raises(FileNotFoundError, match=r"no step 4 in .*: it holds \[1\]"):
        checkpoint.restore(tmp_path / "c", SMALL, step=4)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({**SMALL, "w": jnp.zeros((3, 3))}, r"w: stored float32\[2, 3\], wanted float32\[3, 3\]"),
        ({**SMALL, "w": SMALL["w"].astype(jnp.bfloat16)}, r"w: stored float32\[2, 3\], wanted bfloat16\[2, 3\]"),
        ({**SMALL, "v": jnp.zeros(())}, r"v: stored nothing, wanted float32\[\]"),
        ({"w": SMALL["w"]}, r"b: stored bfloat16\[\], wanted nothing"),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_another_model_is_named_and_not_loaded(tmp_path, like, message):
    checkpoint.save(tmp_path / "c", 0, SMALL)
    with pytest.raises(ValueError, match=f"nothing was loaded. {message}. Restore it with"):
        checkpoint.restore(tmp_path / "c", like)


@pytest.mark.parametrize(
    ("state", "notes", "message"),
    [
        ({"name": "text"}, {}, r"state\['name'\] is a str, only arrays"),
        ({"key": jax.random.key(0)}, {}, r"state\['key'\] is a key<fry>, only arrays"),
        (SMALL, {"std": float("nan")}, "not JSON compliant"),
    ],
    ids=["string", "typed key", "NaN note"],
)
def test_only_arrays_and_json_go_in(tmp_path, state, notes, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", 0, state, notes=notes)
    assert not (tmp_path / "c").exists()
