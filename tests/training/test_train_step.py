"""One step is one step: micro-batches, devices and jit change nothing; a bad gradient is not applied."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.objectives import reward_model, sft
from rlhf_jax.runtime.sharding import make_mesh, replicated, shard_batch
from rlhf_jax.training.train_step import init_train_state, make_train_step, split_leading, update_epochs
from rlhf_jax.types import RankingBatch, SequenceBatch


def ragged(num_rows: int, length: int = 7, seed: int = 0) -> SequenceBatch:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, length + 1, num_rows)
    columns = np.arange(length)[None]
    segments = (columns < sizes[:, None]).astype(np.int32)
    starts = rng.integers(1, sizes)[:, None]
    return SequenceBatch(
        tokens=rng.integers(0, tiny.VOCAB, (num_rows, length)).astype(np.int32),
        segment_ids=segments,
        loss_mask=(segments > 0) & (columns >= starts),
    )


def rankings(num_prompts: int, seed: int = 0) -> RankingBatch:
    rng = np.random.default_rng(seed)
    rows = ragged(num_prompts * 3, seed=seed)
    shape = (num_prompts, 3, 7)
    mask = np.ones((num_prompts, 3), bool)
    mask[1, 2] = False
    return RankingBatch(
        tokens=rows.tokens.reshape(shape),
        segment_ids=rows.segment_ids.reshape(shape),
        completion_mask=rows.loss_mask.reshape(shape),
        ranks=rng.integers(0, 3, (num_prompts, 3)).astype(np.int32),
        mask=mask,
    )


def sgd_step(objective, params, batch, **options):
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_train_step(objective, optimizer, **options))
    return step(init_train_state(params, optimizer), batch)


def assert_close(a, b, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


def test_sft_loss_is_the_mean_over_completion_tokens():
    params, batch = tiny.init_params(), ragged(4)
    total, weight, _ = jax.jit(sft(tiny.MODEL))(params, batch)

    @jax.jit
    def next_logits(params):
        """After 1 to 6 tokens, each from a forward that is given no more of them: `[6, 4, V]`."""
        logits = []
        for t in range(1, 7):
            positions, segments = np.tile(np.arange(t), (4, 1)), np.ones((4, t), np.int32)
            hidden, _ = tiny.MODEL.hidden(params, jnp.asarray(batch.tokens[:, :t]), positions, segments)
            logits.append(tiny.MODEL.unembed(params, hidden[:, -1]))
        return jnp.stack(logits)

    after = np.asarray(next_logits(params), np.float64)
    expected, count = 0.0, 0
    for row in range(4):
        for t in range(7):
            if batch.loss_mask[row, t]:
                logits = after[t - 1, row]
                expected -= logits[batch.tokens[row, t]] - np.log(np.exp(logits).sum())
                count += 1
    assert int(weight) == count
    np.testing.assert_allclose(total, expected, rtol=1e-4)


@pytest.mark.parametrize("case", ["sft", "reward_model"])
def test_micro_batches_and_devices_change_nothing(case):
    """Four of them on two devices at once."""
    params = tiny.init_params()
    if case == "sft":
        objective, batch = sft(tiny.MODEL), ragged(8)
    else:
        params = {"trunk": params, "head": tiny.init_frozen().reward_params["head"]}
        objective, batch = reward_model(tiny.MODEL, centering_coef=0.01), rankings(8)
    whole, metrics = sgd_step(objective, params, batch)
    mesh = make_mesh()
    assert mesh.shape["data"] == 2
    params, batch = jax.device_put(params, replicated(mesh)), shard_batch(batch, mesh)
    parts, part_metrics = sgd_step(objective, params, batch, num_micro_batches=4)
    assert_close(whole, parts)
    assert_close(metrics, part_metrics)


def test_a_pair_far_from_balance_moves_the_right_way():
    """A step on one ranking raises the better response's score above the worse one's."""
    params = {"trunk": tiny.init_params(), "head": tiny.init_frozen().reward_params["head"]}
    batch = rankings(8)
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(reward_model(tiny.MODEL), optimizer))
    state, before = step(init_train_state(params, optimizer), batch)
    for _ in range(39):
        state, metrics = step(state, batch)
    assert float(metrics["rm/loss"]) < 0.5 * float(before["rm/loss"])
    assert float(metrics["rm/accuracy"]) > 0.9


def test_non_finite_gradient_is_not_applied():
    params, batch = tiny.init_params(), ragged(4)
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(sft(tiny.MODEL), optimizer))
    good, _ = step(init_train_state(params, optimizer), batch)
    poisoned = good.replace(params={**good.params, "final_norm": good.params["final_norm"].at[3].set(jnp.nan)})
    after, metrics = step(poisoned, batch)
    assert float(metrics["grad/finite"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, after, poisoned)


def test_minibatches_cover_the_batch_once_an_epoch():
    """The 'parameters' count how often each row was seen."""

    def objective(params, rows):
        return -(params * jax.nn.one_hot(rows, 12).sum(axis=0)).sum(), jnp.ones(()), {}

    optimizer = optax.sgd(1.0)
    step = make_train_step(objective, optimizer)
    state = init_train_state(jnp.zeros(12), optimizer)
    state, metrics = update_epochs(step, state, jnp.arange(12), jax.random.key(0), num_epochs=3, num_minibatches=4)
    np.testing.assert_array_equal(state.params, np.full(12, 3.0))
    assert int(state.step) == 12
    assert metrics["grad/norm"].shape == (12,)


def test_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="leading dimension 7 does not divide into 2 parts"):
        split_leading(ragged(7), 2)
    with pytest.raises(ValueError, match="batch of 7 rows does not divide into 2 minibatches"):
        update_epochs(lambda s, b: (s, {}), None, ragged(7), jax.random.key(0), num_epochs=1, num_minibatches=2)
    with pytest.raises(ValueError, match=r"has 7 rows, which 2 devices cannot share evenly: use 6 or 8"):
        shard_batch(ragged(7), make_mesh())


@pytest.mark.parametrize(("kl_stop", "taken"), [(1e9, 12), (2.5, 4), (-1.0, 1)])
def test_kl_stop_skips_what_comes_after_the_step_that_went_too_far(kl_stop, taken):
    """The 'KL' grows by one a step: 0, 1, 2, 3, ...; the step that passes the limit is the last."""

    def step(state, rows):
        metrics = {"policy/approxkl_avg": state.step.astype(jnp.float32), "grad/finite": jnp.ones(())}
        return state.replace(step=state.step + 1, params=state.params + rows.sum()), metrics

    state = init_train_state(jnp.zeros(()), optax.sgd(1.0))
    state, metrics = jax.jit(
        lambda s: update_epochs(
            step, s, jnp.ones(12), jax.random.key(0), num_epochs=3, num_minibatches=4, kl_stop=kl_stop
        )
    )(state)
    assert int(state.step) == taken
    assert float(state.params) == 3 * taken
    np.testing.assert_array_equal(metrics["update/taken"], np.arange(12) < taken)
    np.testing.assert_array_equal(metrics["policy/approxkl_avg"], np.where(np.arange(12) < taken, np.arange(12), 0))
