"""The whole iteration: on-policy at the start, pure, vmappable, the same in pieces, and for models that are not ours."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from training.pieces import NEW, SIZES, fresh_state, parts

from rlhf_jax.functional.aggregation import sequence_mean
from rlhf_jax.functional.policy_losses import clipped_policy_loss
from rlhf_jax.generation.continuous import generate_continuously
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.models.uncached import uncached_model
from rlhf_jax.objectives import PolicyBatch, actor_critic, policy_gradient, separate_critic, shared_critic
from rlhf_jax.runtime.metrics import check_finite
from rlhf_jax.runtime.sharding import make_mesh, replicated, shard_batch
from rlhf_jax.training.ppo import PPOBatch, init_ppo_state, make_ppo_iteration, make_ppo_update
from rlhf_jax.training.rollout import check_scores
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Frozen, SequenceBatch

ITERATION = jax.jit(make_ppo_iteration(*parts()))


@jax.jit
def rollout(state, frozen, prompts):
    sample, score, experience, _ = parts()
    generation = sample(state.params["policy"], prompts, jax.random.key(0))
    scores = score(frozen, generation)
    return generation, *experience(state.params, frozen.ref_params, generation, scores, state.kl_coef)


@cache
def first_experience(width=5):
    state = fresh_state()
    return state, *rollout(state, tiny.init_frozen(), tiny.prompts(SIZES, width))


def test_on_policy_before_the_first_update():
    state, _, experience, metrics = first_experience()
    objective = actor_critic(tiny.MODEL, separate_critic(tiny.MODEL))
    _, weight, losses = jax.jit(objective)(state.params, PolicyBatch(experience))
    mean = {name: float(total / w) for name, (total, w) in losses.items()}
    assert abs(mean["val/ratio"] - 1.0) < 1e-5
    assert mean["policy/approxkl_avg"] < 1e-6
    assert mean["policy/clipfrac_avg"] == 0.0
    assert mean["policy/entropy_avg"] > 0
    assert float(weight) == float(experience.mask.sum())
    assert abs(float(metrics["objective/kl"])) < 1e-4  # KL(pi, pi)


def test_scores_survive_as_floats():
    """A score of 0.7 is 0.7 on the last token, and the return of a one-token row."""
    state, generation, *_ = first_experience()
    experience_fn = jax.jit(parts()[2])
    scores = np.full((len(SIZES),), 0.7, np.float32)
    batch, metrics = experience_fn(state.params, state.params["policy"], generation, scores, 0.0)
    np.testing.assert_allclose(metrics["objective/scores"], 0.7, rtol=1e-6)
    last = np.asarray(generation.completion_mask).cumsum(axis=1).argmax(axis=1)
    np.testing.assert_allclose(np.asarray(batch.returns)[np.arange(len(SIZES)), last], 0.7, rtol=1e-5)


def test_iteration_is_pure_and_moves():
    frozen, batch = tiny.init_frozen(), PPOBatch(tiny.prompts(SIZES))
    state, metrics = ITERATION(frozen, fresh_state(), batch, jax.random.key(0))
    again, same = ITERATION(frozen, fresh_state(), batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, (state, metrics), (again, same))
    assert int(state.step) == 1
    assert float(metrics["policy/first_approxkl"]) < 1e-6
    assert float(metrics["objective/entropy"]) >= 0
    assert all(np.isfinite(float(x)) for x in metrics.values())
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, fresh_state().params)
    assert min(jax.tree.leaves(moved)) > 0


def test_adaptive_leash_follows_the_kl():
    frozen, batch = tiny.init_frozen(), PPOBatch(tiny.prompts(SIZES))
    near, _ = ITERATION(frozen, fresh_state(), batch, jax.random.key(0))
    far, metrics = ITERATION(frozen.replace(ref_params=tiny.init_params(9)), fresh_state(), batch, jax.random.key(0))
    assert float(metrics["objective/kl"]) > 1.2
    np.testing.assert_allclose(near.kl_coef, 0.1 * (1 - 0.2 * len(SIZES) / 100.0), rtol=1e-5)
    np.testing.assert_allclose(far.kl_coef, 0.1 * (1 + 0.2 * len(SIZES) / 100.0), rtol=1e-5)


@pytest.mark.slow  # 200 operations, each compiled alone; the objectives are compared so in test_algorithms.py
def test_jit_changes_nothing():
    frozen, batch = tiny.init_frozen(), PPOBatch(tiny.prompts((3, 5, 1, 4)))
    jitted = jax.jit(make_ppo_iteration(*parts(num_epochs=1)))(frozen, fresh_state(), batch, jax.random.key(0))
    plain = make_ppo_iteration(*parts(num_epochs=1))(frozen, fresh_state(), batch, jax.random.key(0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), jitted[0].params, plain[0].params)


def test_vmap_over_seeds_equals_a_loop():
    frozen, batch = tiny.init_frozen(), PPOBatch(tiny.prompts(SIZES))
    keys = jax.random.split(jax.random.key(1), 3)
    states = [fresh_state(seed) for seed in (0, 5, 6)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    together, metrics = jax.device_get(
        jax.jit(jax.vmap(make_ppo_iteration(*parts()), in_axes=(None, 0, None, 0)))(frozen, stacked, batch, keys)
    )
    for i, state in enumerate(states):
        alone, alone_metrics = ITERATION(frozen, state, batch, keys[i])
        np.testing.assert_allclose(metrics["objective/scores"][i], alone_metrics["objective/scores"], atol=1e-5)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=2e-4), together.params, alone.params
        )


def test_completions_differ_between_iterations():
    """Two iterations of one policy: the reward, which reads the completions alone, sees others."""
    seen = []
    for step in range(2):
        key = jax.random.fold_in(jax.random.key(0), step)
        _, metrics = ITERATION(tiny.init_frozen(), fresh_state(), PPOBatch(tiny.prompts(SIZES)), key)
        seen.append(float(metrics["objective/scores"]))
    assert seen[0] != seen[1]


@jax.jit
def iteration_with_a_score(third, *args):
    """An iteration whose reward gives completion 3 a score that is told."""
    sample, score, experience, update = parts()
    return make_ppo_iteration(sample, lambda *args: score(*args).at[3].set(third), experience, update)(*args)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_changes_nothing_and_is_named(bad):
    before = fresh_state()
    after, metrics = iteration_with_a_score(
        np.float32(bad), tiny.init_frozen(), before, PPOBatch(tiny.prompts(SIZES)), jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    with pytest.raises(
        FloatingPointError, match=r"ppo step 0: not finite: the gradient.*objective/scores.*not applied"
    ):
        check_finite({name: float(value) for name, value in metrics.items()}, stage="ppo", step=0)


def test_scores_of_a_python_reward_are_checked():
    np.testing.assert_array_equal(check_scores([1, 0.7, True], num_completions=3), np.float32([1, 0.7, 1]))
    with pytest.raises(
        ValueError, match=r"length: 2 of 3 scores are not finite \(completion 0: nan, completion 2: inf\)"
    ):
        check_scores([None, 1.0, np.inf], num_completions=3, name="length")
    with pytest.raises(ValueError, match=r"returned float64 values of shape \(2,\) for 3 completions.*Fix: return one"):
        check_scores([0.1, 0.2], num_completions=3)
    with pytest.raises(ValueError, match="for 1 completions"):
        check_scores(["good"], num_completions=1)


def ptx_rows(num_rows):
    rng = np.random.default_rng(0)
    return SequenceBatch(
        tokens=rng.integers(0, tiny.VOCAB, (num_rows, 7)).astype(np.int32),
        segment_ids=np.ones((num_rows, 7), np.int32),
        loss_mask=np.tile(np.arange(7) >= 3, (num_rows, 1)),
    )


@cache
def sgd_step(objective, num_micro_batches):
    optimizer = optax.sgd(1.0)
    step = make_train_step(objective, optimizer, num_micro_batches=num_micro_batches)
    return jax.jit(lambda params, batch: step(init_train_state(params, optimizer), batch)[0].params)


def gradient(objective, params, batch, num_micro_batches=1):
    return sgd_step(objective, num_micro_batches)(params, batch)


@pytest.mark.parametrize("critic", [separate_critic(tiny.MODEL), shared_critic], ids=["separate", "shared"])
def test_micro_batches_and_devices_change_no_gradient(critic):
    """Four of them on two devices at once, with PPO-ptx mixed in, whose normaliser is another one."""
    state, _, experience, _ = first_experience()
    objective = actor_critic(tiny.MODEL, critic, entropy_coef=0.01, temperature=0.7)
    batch = PolicyBatch(experience, ptx_rows(8), np.full((8,), 0.3, np.float32))
    mesh = make_mesh()
    assert mesh.shape["data"] == 2
    params = jax.device_put(state.params, replicated(mesh))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-6),
        gradient(objective, state.params, batch),
        gradient(objective, params, shard_batch(batch, mesh), num_micro_batches=4),
    )


def test_padding_changes_no_gradient():
    state, _, narrow, _ = first_experience(width=5)
    wide = first_experience(width=8)[2]
    objective = actor_critic(tiny.MODEL, separate_critic(tiny.MODEL))
    check = partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-6)
    jax.tree.map(
        check,
        gradient(objective, state.params, PolicyBatch(narrow)),
        gradient(objective, state.params, PolicyBatch(wide)),
    )


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (actor_critic(tiny.MODEL, separate_critic(tiny.MODEL)), {}),
        (
            policy_gradient(tiny.MODEL, clipped_policy_loss, aggregate=sequence_mean),
            {"aggregate": sequence_mean},
        ),
    ],
    ids=["over tokens", "over completions"],
)
def test_ptx_weight_is_relative_to_the_mean_losses(objective, options):
    """total / weight = the policy's mean loss + ptx_coef * mean demonstration loss."""
    state, _, experience, _ = first_experience()

    def spy(train_state, batch):
        total, weight, metrics = objective(train_state.params, batch)
        plain, _, _ = objective(train_state.params, PolicyBatch(batch.experience))
        ptx = metrics["loss/ptx_avg"]
        return train_state, {
            "gap": (total - plain) / weight,
            "ptx": ptx[0] / ptx[1],
            "policy/approxkl_avg": jnp.zeros(()),
            "grad/finite": jnp.ones(()),
        }

    update = make_ppo_update(spy, num_epochs=1, num_minibatches=1, ptx_coef=2.5, **options)
    _, metrics = jax.jit(update)(state, experience, ptx_rows(8), jnp.zeros(()), jax.random.key(0))
    np.testing.assert_allclose(metrics["gap"], 2.5 * metrics["ptx"], rtol=1e-4)


def test_pieces_with_a_python_reward_raise_it():
    """Reward = the share of token 7, computed in Python between two jitted halves: it goes up."""
    sample, _, experience_fn, update = (jax.jit(f) for f in parts(optimizer=optax.adam(3e-3), kl_target=None))
    state = init_ppo_state(tiny.init_params(), tiny.init_critic(), optax.adam(3e-3), kl_coef=0.02)
    ref, prompts, rewards = tiny.init_params(), tiny.prompts(SIZES * 4), []
    for step in range(25):
        key = jax.random.fold_in(jax.random.key(0), step)
        generation = sample(state.params["policy"], prompts, key)
        rows = zip(*jax.device_get((generation.tokens, generation.completion_mask)), strict=True)
        scores = np.float32([np.mean(tokens[mask] == 7) for tokens, mask in rows])
        rewards.append(float(scores.mean()))
        batch, metrics = experience_fn(state.params, ref, generation, scores, state.kl_coef)
        state, _ = update(state, batch, None, metrics["objective/kl"], key)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3, rewards


class LinenNetwork(nn.Module):
    """A bag of the last tokens: logits of `t` depend on the embeddings of tokens up to `t`."""

    @nn.compact
    def __call__(self, tokens, segment_ids):
        x = nn.Embed(tiny.VOCAB, 12)(tokens) * (segment_ids > 0)[..., None]
        return nn.Dense(tiny.VOCAB)(nn.tanh(nn.Dense(12)(jnp.cumsum(x, axis=1))))


class NNXNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(tiny.VOCAB, 12, rngs=rngs)
        self.inner = nnx.Linear(12, 12, rngs=rngs)
        self.outer = nnx.Linear(12, tiny.VOCAB, rngs=rngs)

    def __call__(self, tokens, segment_ids):
        x = self.embed(tokens) * (segment_ids > 0)[..., None]
        return self.outer(nnx.tanh(self.inner(jnp.cumsum(x, axis=1))))


def linen_case():
    network = LinenNetwork()
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 2), np.int32), np.ones((1, 2), np.int32))
    return params, lambda params, tokens, positions, segment_ids: network.apply(params, tokens, segment_ids)


def nnx_case():
    params = jax.jit(lambda: nnx.split(NNXNetwork(nnx.Rngs(0)))[1])()
    graph, _ = nnx.split(nnx.eval_shape(lambda: NNXNetwork(nnx.Rngs(0))))
    return params, lambda params, tokens, positions, segment_ids: nnx.merge(graph, params)(tokens, segment_ids)


@pytest.mark.parametrize("case", [linen_case, nnx_case])
def test_any_flax_module_runs_the_whole_iteration(case):
    """The module gives logits; they serve as hidden states with an identity for `unembed`."""
    params, apply_fn = case()
    model = uncached_model(apply_fn, lambda params, hidden: hidden)
    critic_params = {"head": init_value_head(tiny.VOCAB)}
    optimizer = optax.adam(1e-2)
    iteration = jax.jit(make_ppo_iteration(*parts(model, shared_critic, optimizer)))
    frozen = Frozen(params, tiny.init_frozen().reward_params, jnp.zeros(()), jnp.ones(()))
    state = init_ppo_state(params, critic_params, optimizer)
    state, metrics = iteration(frozen, state, PPOBatch(tiny.prompts(SIZES)), jax.random.key(0))
    assert float(metrics["policy/first_approxkl"]) < 1e-6
    assert abs(float(metrics["objective/kl"])) < 1e-4
    assert float(metrics["grad/norm"]) > 0


def test_refilled_slots_are_on_policy():
    """The sampler with a queue in the place of `generate`: a whole iteration's first step has ratio 1."""
    _, *others = parts(num_epochs=1, num_minibatches=1)
    options = {"max_new_tokens": NEW, "eos_id": tiny.EOS, "pad_id": tiny.PAD, "num_slots": 3}
    sample = partial(generate_continuously, tiny.MODEL, **options)
    batch = PPOBatch(tiny.prompts(SIZES))
    iteration = jax.jit(make_ppo_iteration(sample, *others))
    _, metrics = iteration(tiny.init_frozen(), fresh_state(), batch, jax.random.key(0))
    assert abs(float(metrics["val/ratio"]) - 1.0) < 1e-5
    assert float(metrics["policy/first_approxkl"]) < 1e-6
