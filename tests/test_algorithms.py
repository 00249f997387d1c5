"""One table of all methods, and what every one of them must satisfy. A new method adds a row.

The batches hold real padding, prompts of several sizes and masked rows; one compiled function a row serves all properties,
and a second one the split over two micro-batches on two devices.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.functional import (
    cispo_loss,
    clipped_policy_loss,
    constant_length_mean,
    cpo_loss,
    dpo_loss,
    gae,
    group_relative,
    gspo_loss,
    ipo_loss,
    k1,
    k3_straight_through,
    kto_loss,
    leave_one_out,
    masked_whiten,
    mean_against_reference,
    mean_per_token,
    orpo_loss,
    plackett_luce_loss,
    reinforce_loss,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rewards_to_go,
    robust_dpo_loss,
    sequence_mean,
    shape_rewards,
    simpo_loss,
    sums_and_nll,
    token_mean,
)
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.objectives import (
    PolicyBatch,
    actor_critic,
    labelled_preference,
    of_policy,
    pair_token_logprobs,
    policy_gradient,
    preference,
    reward_model,
    sequence_token_logprobs,
    sft,
    shared_critic,
)
from rlhf_jax.runtime.sharding import make_mesh, replicated, shard_batch
from rlhf_jax.training.choices import best_and_worst, best_of_group, labelled_rows, ranked_pairs
from rlhf_jax.training.groups import per_completion
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Experience, Generation, PreferenceBatch, RankingBatch, SequenceBatch

B, G, T = 8, 4, 9
POLICY, REFERENCE = tiny.init_params(), tiny.init_params(7)
MODEL = tiny.MODEL
logprobs_of = jax.jit(partial(sequence_token_logprobs, MODEL))
pair_logprobs_of = jax.jit(partial(pair_token_logprobs, MODEL))


def rows(seed=0):
    """Prompt and completion of several sizes, padded on the right; and the mask of the completions."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat([2, 3], G)[:, None]
    ends = prompts + rng.integers(1, 5, (B, 1))
    columns = np.arange(T)[None]
    tokens = rng.integers(2, tiny.VOCAB, (B, T)).astype(np.int32)
    tokens[:, :3] = np.repeat(tokens[::G, :3], G, axis=0)
    return tokens * (columns < ends), (columns < ends).astype(np.int32), (columns >= prompts) & (columns < ends)


TOKENS, SEGMENTS, MASK = (jnp.asarray(x) for x in rows())
OLD, REF = (jnp.where(MASK, logprobs_of(params, TOKENS, SEGMENTS), 0.0) for params in (POLICY, REFERENCE))
SCORES = jnp.asarray(np.random.default_rng(1).normal(size=B).astype(np.float32))
REWARDS = {coef: shape_rewards(SCORES, OLD, REF, MASK, kl_coef=coef) for coef in (0.0, 0.1)}
UNEVEN = MASK & (jnp.arange(B) != 5)[:, None]  # so that two micro-batches are not of one weight
GENERATION = Generation(TOKENS, SEGMENTS, MASK, OLD, jnp.ones(B, bool))
DEMONSTRATIONS = SequenceBatch(TOKENS, SEGMENTS, MASK)


def experience(advantages_fn, kl_coef=0.0, mask=MASK):
    return PolicyBatch(Experience(TOKENS, SEGMENTS, mask, OLD, advantages_fn(REWARDS[kl_coef], MASK), ref_logprobs=REF))


def ppo_experience():
    values = jnp.where(MASK, jnp.asarray(np.random.default_rng(2).normal(size=(B, T)).astype(np.float32)), 0.0)
    advantages, returns = gae(REWARDS[0.1], values, MASK)
    return Experience(TOKENS, SEGMENTS, MASK, OLD, masked_whiten(advantages, MASK), values, returns)


def with_reference(batch):
    return batch.replace(ref_logprobs=pair_logprobs_of(REFERENCE, batch))


def rankings():
    """Four prompts with three answers, ties and an empty place among them."""
    tokens, segments, completions = (np.concatenate([x, y]) for x, y in zip(rows(), rows(5), strict=True))
    take = np.array([[0, 1, 2], [4, 5, 6], [8, 9, 10], [12, 13, 14]])
    ranks, mask = np.array([[0, 1, 2], [1, 0, 0], [2, 0, 1], [1, 0, 0]]), np.ones((4, 3), bool)
    mask[3, 2] = False
    return RankingBatch(*(jnp.asarray(x) for x in (tokens[take], segments[take], completions[take], ranks, mask)))


def arrays(batch):
    return jax.tree.map(jnp.asarray, batch)


PAIRS = with_reference(arrays(jax.tree.map(lambda x: x[:8], ranked_pairs(rankings()))))
assert len(PAIRS.mask) == 8
LABELLED = arrays(labelled_rows(jax.tree.map(np.asarray, PAIRS.replace(ref_logprobs=None)), pad_id=tiny.PAD))
LABELLED = with_reference(jax.tree.map(lambda x: x[::2], LABELLED).replace(desirable=jnp.arange(8) % 3 > 0))
PAIRS = PAIRS.replace(mask=jnp.arange(8) != 5)  # so that two micro-batches are not of one weight
ONLINE = jax.tree.map(lambda x: jnp.tile(x, (2,) + (1,) * (x.ndim - 1)), best_and_worst(GENERATION, SCORES))
ONLINE = with_reference(ONLINE.replace(mask=jnp.arange(8) != 2))  # a tie


class Case(NamedTuple):
    """A row of the table."""

    objective: Any
    batch: Any
    params: Any
    num_micro_batches: int = 2
    on_policy: Any = None
    """For losses that are the policy gradient at ratio 1: the aggregation."""


def group(loss_fn, aggregate=sequence_mean, advantages_fn=None, kl_coef=0.0, mask=UNEVEN, **options):
    advantages_fn = advantages_fn or per_completion(group_relative, group_size=G)
    objective = policy_gradient(MODEL, loss_fn, aggregate=aggregate, **options)
    return Case(objective, experience(advantages_fn, kl_coef, mask), {"policy": POLICY}, on_policy=aggregate)


def direct(loss_fn, beta, batch=PAIRS, **options):
    return Case(preference(MODEL, loss_fn, beta=beta, **options), batch, POLICY)


CRITIC = {"policy": POLICY, "critic": {"head": init_value_head(tiny.CONFIG.model_dim)}}
SUM = partial(constant_length_mean, length=1)
CASES = {
    "sft": Case(sft(MODEL), DEMONSTRATIONS, POLICY),
    "reward model": Case(reward_model(MODEL, centering_coef=0.01), rankings(), tiny.init_frozen().reward_params),
    "reward model, Plackett-Luce": Case(
        reward_model(MODEL, ranking_loss=plackett_luce_loss), rankings(), tiny.init_frozen().reward_params
    ),
    "PPO": Case(actor_critic(MODEL, shared_critic, dual_clip=3.0), PolicyBatch(ppo_experience()), CRITIC),
    "PPO-ptx": Case(
        actor_critic(MODEL, shared_critic),
        PolicyBatch(ppo_experience(), DEMONSTRATIONS, jnp.full((B,), 0.3)),
        CRITIC,
    ),
    "GRPO": group(clipped_policy_loss),
    "GRPO, KL in the loss": group(clipped_policy_loss)._replace(
        objective=policy_gradient(
            MODEL,
            clipped_policy_loss,
            aggregate=sequence_mean,
            kl_coef=0.2,
            kl_fn=k3_straight_through,
        )
    ),
    "Dr. GRPO": group(
        clipped_policy_loss,
        partial(constant_length_mean, length=5),
        per_completion(group_relative, group_size=G, scale=False),
    ),
    "DAPO": group(  # the second group has no spread and is masked
        partial(clipped_policy_loss, clip_high=0.28), token_mean, mask=MASK & (jnp.arange(B) < G)[:, None]
    ),
    "GSPO": group(gspo_loss),
    "GSPO-token": group(gspo_loss, advantages_fn=rewards_to_go),
    "CISPO": group(cispo_loss, token_mean),
    "RLOO": group(reinforce_loss, SUM, per_completion(leave_one_out, group_size=G), kl_coef=0.1),
    "REINFORCE++": group(clipped_policy_loss, token_mean, reinforce_plus_plus, kl_coef=0.1),
    "REINFORCE++-baseline": group(clipped_policy_loss, token_mean, partial(reinforce_plus_plus_baseline, group_size=G)),
    "ReMax": group(
        reinforce_loss, SUM, lambda rewards, mask: jnp.where(mask, rewards_to_go(rewards, mask) - 0.3, 0.0), kl_coef=0.1
    ),
    "RAFT": Case(
        of_policy(sft(MODEL)),
        jax.tree.map(lambda x: jnp.concatenate([x, x]), best_of_group(GENERATION, SCORES, group_size=G)),
        {"policy": POLICY},
    ),
    "online DPO": Case(of_policy(preference(MODEL, dpo_loss, beta=0.1)), ONLINE, {"policy": POLICY}),
    "DPO": direct(dpo_loss, 0.1),
    "DPO with a likelihood term": direct(dpo_loss, 0.1, nll_coef=1.0),
    "cDPO": direct(partial(dpo_loss, label_smoothing=0.1), 0.1),
    "robust DPO": direct(robust_dpo_loss, 0.1),
    "IPO": direct(ipo_loss, 0.1),
    "IPO, means": direct(ipo_loss, 0.1, inputs_fn=mean_against_reference),
    "KTO": Case(labelled_preference(MODEL, kto_loss), LABELLED, POLICY, num_micro_batches=1),  # z is the batch's
    "ORPO": direct(orpo_loss, 0.1, inputs_fn=mean_per_token),
    "SimPO": direct(simpo_loss, 2.0, inputs_fn=mean_per_token),
    "CPO": direct(cpo_loss, 0.1, inputs_fn=sums_and_nll),
}
every_method = pytest.mark.parametrize("name", CASES)
RL = [name for name, case in CASES.items() if isinstance(case.batch, PolicyBatch)]
close = partial(np.testing.assert_allclose, rtol=2e-4, atol=3e-6)


@functools.cache
def compiled(name):
    """`(params, batch) -> ((total, (weight, metrics)), gradient of the total)`."""
    objective = CASES[name].objective

    def total_of(params, batch):
        total, weight, metrics = objective(params, batch)
        return total, (weight, metrics)

    return jax.jit(jax.value_and_grad(total_of, has_aux=True))


@functools.cache
def outcome(name):
    case = CASES[name]
    return compiled(name)(case.params, case.batch)


def each_part(change, batch):
    """`change` applied to every part of the batch that has tokens."""
    if not isinstance(batch, PolicyBatch):
        return change(batch)
    demonstrations = None if batch.demonstrations is None else change(batch.demonstrations)
    return batch.replace(experience=change(batch.experience), demonstrations=demonstrations)


def on_the_left(part):
    """Every row moved to the right end, so that its padding is on the left."""
    segments = np.asarray(part.segment_ids)
    shifts = segments.shape[-1] - (segments > 0).sum(axis=-1)

    def move(x):
        if x.shape != segments.shape:
            return x
        moved = np.array(x)
        for at in np.ndindex(shifts.shape):
            moved[at] = np.roll(moved[at], shifts[at])
        return jnp.asarray(moved)

    return jax.tree.map(move, part)


def garbage(part):
    """Real ids in the padding, and numbers where no token counts."""
    rng = np.random.default_rng(3)
    names = set(part.__dataclass_fields__)
    mask = next(np.asarray(part.__dict__[m]) for m in ("mask", "loss_mask", "completion_mask") if _fits(part, m))
    seen = np.asarray(part.segment_ids) > 0
    if isinstance(part, PreferenceBatch):  # a masked pair may be anything
        seen &= np.asarray(part.mask)[:, None, None]
    changed = {"tokens": np.where(seen, part.tokens, rng.integers(0, 3, part.tokens.shape))}
    for name in names & {"old_logprobs", "advantages", "old_values", "returns", "ref_logprobs"}:
        if part.__dict__[name] is not None:
            changed[name] = np.where(mask, part.__dict__[name], rng.normal(size=mask.shape).astype(np.float32))
    return part.replace(**{name: jnp.asarray(x) for name, x in changed.items()})


def _fits(part, name):
    return name in part.__dataclass_fields__ and part.__dict__[name].shape == part.segment_ids.shape


@every_method
def test_loss_and_gradient_are_finite_and_there(name):
    (total, (weight, metrics)), gradient = outcome(name)
    assert np.isfinite(total)
    assert float(weight) >= 1
    assert all(np.isfinite(x) for pair in metrics.values() for x in pair)
    leaves = jax.tree.leaves(gradient)
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    assert max(float(jnp.abs(leaf).max()) for leaf in leaves) > 1e-3


@every_method
@pytest.mark.parametrize("change", [on_the_left, garbage])
def test_padding_and_what_is_masked_change_nothing(name, change):
    case = CASES[name]
    changed = each_part(change, case.batch)
    different = jax.tree.map(lambda a, b: not np.array_equal(a, b), changed, case.batch)
    assert any(jax.tree.leaves(different))
    jax.tree.map(close, compiled(name)(case.params, changed), outcome(name))


@every_method
def test_micro_batches_and_devices_change_nothing(name):
    """Two of each at once, but for KTO, whose reference point is a statistic of the batch: one micro-batch there."""
    case, optimizer, mesh = CASES[name], optax.sgd(1.0), make_mesh()
    assert mesh.shape["data"] == 2
    step = jax.jit(make_train_step(case.objective, optimizer, num_micro_batches=case.num_micro_batches))
    start = init_train_state(jax.device_put(case.params, replicated(mesh)), optimizer)
    state, metrics = step(start, shard_batch(case.batch, mesh))
    (total, (weight, _)), gradient = outcome(name)
    close(metrics["loss"], total / weight)
    scale = max(1.0, max(float(jnp.abs(leaf).max() / weight) for leaf in jax.tree.leaves(gradient)))

    def same(new, old, g):
        close(new, old - g / weight, atol=3e-6 * scale)

    jax.tree.map(same, state.params, case.params, gradient)


def test_kto_alone_depends_on_the_split():
    """Why it is exempt: halves of a batch have reference points of their own."""
    halves = [jax.tree.map(lambda x, at=at: x[at], LABELLED) for at in (slice(0, 4), slice(4, 8))]
    totals = [CASES["KTO"].objective(POLICY, half)[0] for half in halves]
    assert abs(float(sum(totals)) - float(outcome("KTO")[0][0])) > 1e-5


@every_method
def test_jit_changes_nothing(name):
    case = CASES[name]
    total, weight, metrics = case.objective(case.params, case.batch)
    jax.tree.map(close, (total, (weight, metrics)), outcome(name)[0])


@pytest.mark.parametrize("name", RL)
def test_ratio_is_one_at_the_start(name):
    metrics = {key: float(total / weight) for key, (total, weight) in outcome(name)[0][1][1].items()}
    assert abs(metrics["val/ratio"] - 1) < 1e-5
    assert metrics["policy/approxkl_avg"] < 1e-9
    assert metrics.get("clip_ratio/region_mean", 0.0) == 0.0


@functools.cache
def policy_gradient_of(aggregate):
    """The textbook's, for any aggregation: nothing but the policy's log-probs has a gradient."""

    def surrogate(params, data):
        logprobs = sequence_token_logprobs(MODEL, params["policy"], data.tokens, data.segment_ids)
        return aggregate(-data.advantages * logprobs, data.mask)[0]

    return jax.jit(jax.grad(surrogate))


@pytest.mark.parametrize("name", [name for name in RL if CASES[name].on_policy])
def test_on_policy_every_loss_is_the_policy_gradient(name):
    """So neither the behaviour's quantities nor the advantages, nor a KL term at the reference, carry one of their own."""
    case = CASES[name]
    data = case.batch.experience.replace(ref_logprobs=OLD)
    _, gradient = compiled(name)(case.params, PolicyBatch(data))
    jax.tree.map(close, gradient, policy_gradient_of(case.on_policy)(case.params, data))


WITH_REFERENCE = {
    "GRPO, KL in the loss",
    "online DPO",
    "DPO",
    "DPO with a likelihood term",
    "cDPO",
    "robust DPO",
    "IPO",
}
WITH_REFERENCE |= {"IPO, means", "KTO"}


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if isinstance(c.batch, PolicyBatch) or "DPO" in n or "PO" in n]
)
def test_the_reference_is_data_and_read_only_where_the_method_has_one(name):
    case = CASES[name]
    batch = case.batch.experience if isinstance(case.batch, PolicyBatch) else case.batch
    if batch.ref_logprobs is None:
        assert name not in WITH_REFERENCE
        return
    moved = batch.replace(ref_logprobs=0.5 * batch.ref_logprobs)
    moved = case.batch.replace(experience=moved) if isinstance(case.batch, PolicyBatch) else moved
    (total, _), _ = compiled(name)(case.params, moved)
    assert (float(total) != float(outcome(name)[0][0])) == (name in WITH_REFERENCE)


@every_method
def test_a_few_steps_improve(name):
    """Rollouts: likelier where the advantage is positive, by Σ A log(new / old). Others: the loss falls."""
    case, params = CASES[name], CASES[name].params
    for _ in range(6):
        (_, (weight, _)), gradient = compiled(name)(params, case.batch)
        size = optax.tree.norm(gradient) + 1e-9  # 0 once all is clipped
        params = jax.tree.map(lambda p, g, size=size: p - 0.05 * g / size, params, gradient)
    if isinstance(case.batch, PolicyBatch):
        data = case.batch.experience
        gain = jnp.where(data.mask, logprobs_of(params["policy"], TOKENS, SEGMENTS) - OLD, 0.0) * data.advantages
        assert float(case.on_policy(gain, data.mask)[0] if case.on_policy else gain.sum()) > 0
    else:
        (total, _), _ = compiled(name)(params, case.batch)
        assert float(total / weight) < float(outcome(name)[0][0] / outcome(name)[0][1][0])


def test_what_cannot_be_meant_is_refused():
    case = CASES["GRPO"]
    with pytest.raises(ValueError, match="k1 in a loss restrains nothing"):
        policy_gradient(MODEL, clipped_policy_loss, kl_coef=0.1, kl_fn=k1)
    bare = PolicyBatch(case.batch.experience.replace(ref_logprobs=None))
    with pytest.raises(ValueError, match="the experience has no ref_logprobs"):
        CASES["GRPO, KL in the loss"].objective(case.params, bare)
    with pytest.raises(ValueError, match="mixes in no demonstrations"):
        case.objective(case.params, case.batch.replace(demonstrations=DEMONSTRATIONS))
    with pytest.raises(ValueError, match="the batch has no ref_logprobs"):
        CASES["DPO"].objective(POLICY, PAIRS.replace(ref_logprobs=None))


def test_metrics_of_preferences_have_their_usual_meaning():
    """`rewards/*` against a loop over pairs."""
    metrics = {key: float(total / weight) for key, (total, weight) in outcome("DPO")[0][1][1].items()}
    own, ref = (np.asarray(pair_logprobs_of(p, PAIRS), np.float64) for p in (POLICY, REFERENCE))
    mask = np.asarray(PAIRS.completion_mask)
    sums = np.array([[row[m].sum() for row, m in zip(*pair, strict=True)] for pair in zip(own, mask, strict=True)])
    refs = np.array([[row[m].sum() for row, m in zip(*pair, strict=True)] for pair in zip(ref, mask, strict=True)])
    kept = np.asarray(PAIRS.mask)
    assert not kept.all()
    sums, refs = sums[kept], refs[kept]
    rewards = 0.1 * (sums - refs)
    expected = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
        "logps/chosen": sums[:, 0].mean(),
        "logps/rejected": sums[:, 1].mean(),
    }
    assert set(metrics) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, err_msg=key)
