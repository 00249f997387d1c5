"""One table of all methods, and what every one of them must satisfy. A new method adds a row.

The batches hold real padding, prompts of several sizes and masked rows; one compiled function a row serves all properties,
and a second one the split over two micro-batches on two devices.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tyro

from rlhf_jax.functional import (
    against_reference,
    batch_relative,
    cispo_loss,
    clipped_policy_loss,
    clipped_sequence_loss,
    clipped_value_loss,
    constant_length_mean,
    cpo_loss,
    dpo_loss,
    first_choice_loss,
    gae,
    group_relative,
    gspo_loss,
    ipo_loss,
    k1,
    k2,
    k3_straight_through,
    kto_loss,
    leave_one_out,
    masked_whiten,
    mean_against_reference,
    mean_per_token,
    orpo_loss,
    pairwise_ranking_loss,
    plackett_luce_loss,
    regression_loss,
    reinforce_loss,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rewards_to_go,
    robust_dpo_loss,
    sequence_mean,
    shape_rewards,
    simpo_loss,
    step_reward_loss,
    sums_and_nll,
    token_mean,
)
from rlhf_jax.models.heads import init_attribute_head, init_value_head
from rlhf_jax.objectives import (
    AttributeBatch,
    PolicyBatch,
    StepBatch,
    actor_critic,
    attribute_regression,
    labelled_preference,
    of_policy,
    pair_token_logprobs,
    policy_gradient,
    preference,
    process_reward,
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


def arrays(batch):
    return jax.tree.map(jnp.asarray, batch)


def like(change, batch):
    """`change` of every array, as numpy: an operation of JAX of its own is a compilation of its own."""
    return arrays(jax.tree.map(lambda x: change(np.asarray(x)), batch))


TOKENS, SEGMENTS, MASK = (jnp.asarray(x) for x in rows())
OLD, REF = (
    jnp.asarray(np.where(MASK, logprobs_of(params, TOKENS, SEGMENTS), np.float32(0))) for params in (POLICY, REFERENCE)
)
SCORES = jnp.asarray(np.random.default_rng(1).normal(size=B).astype(np.float32))
REWARDS = {coef: jax.jit(partial(shape_rewards, kl_coef=coef))(SCORES, OLD, REF, MASK) for coef in (0.0, 0.1)}
UNEVEN = like(lambda mask: mask & (np.arange(B) != 5)[:, None], MASK)  # so that two micro-batches are not of one weight
GENERATION = Generation(TOKENS, SEGMENTS, MASK, OLD, jnp.asarray(np.ones(B, bool)))
DEMONSTRATIONS = SequenceBatch(TOKENS, SEGMENTS, MASK)


@functools.cache
def of_a_group(signal):
    return partial(signal, group_size=G) if "group_size" in inspect.signature(signal).parameters else signal


@functools.cache
def advantages_of(signal, kl_coef):
    """`signal` is a function of completions' scores, or of tokens' rewards: its first argument says which."""
    arguments = list(inspect.signature(signal).parameters)
    advantages_fn = per_completion(signal) if arguments[0] in ("scores", "advantages") else signal
    return jax.jit(advantages_fn)(REWARDS[kl_coef], MASK)


@jax.jit
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


def attributes():
    """Three ratings of each row, of which people gave some."""
    rng = np.random.default_rng(6)
    given = (rng.random((B, 3)) < 0.6) | (np.arange(3) == 0)
    return AttributeBatch(TOKENS, SEGMENTS, jnp.asarray(rng.normal(size=(B, 3)).astype(np.float32)), jnp.asarray(given))


def steps():
    """Some tokens of every completion end a step."""
    rng = np.random.default_rng(7)
    ends = np.asarray(MASK) & (rng.random((B, T)) < 0.6)
    return StepBatch(TOKENS, SEGMENTS, jnp.asarray(rng.random((B, T)).astype(np.float32)), jnp.asarray(ends))


PAIRS = with_reference(arrays(jax.tree.map(lambda x: x[:8], ranked_pairs(rankings()))))
assert len(PAIRS.mask) == 8
LABELLED = arrays(labelled_rows(jax.tree.map(np.asarray, PAIRS.replace(ref_logprobs=None)), pad_id=tiny.PAD))
LABELLED = with_reference(like(lambda x: x[::2], LABELLED).replace(desirable=jnp.asarray(np.arange(8) % 3 > 0)))
PAIRS = PAIRS.replace(mask=jnp.asarray(np.arange(8) != 5))  # so that two micro-batches are not of one weight
ONLINE = like(lambda x: np.concatenate([x, x]), jax.jit(best_and_worst)(GENERATION, SCORES))
ONLINE = with_reference(ONLINE.replace(mask=jnp.asarray(np.arange(8) != 2)))  # a tie


class Shown(NamedTuple):
    """What README's table says of a method: the very functions of its row, where it was published, and what runs it."""

    objective: Callable
    signal: tuple[Callable, ...]
    losses: tuple[Callable, ...]
    paper: str
    script: str = ""
    kl_in_reward: bool = False


class Case(NamedTuple):
    """A row of the table."""

    objective: Any
    batch: Any
    params: Any
    shown: Shown
    num_micro_batches: int = 2
    on_policy: Any = None
    """For losses that are the policy gradient at ratio 1: the aggregation."""


def rewards_of(paper, build, loss_fn, batch, params, script="", **options):
    return Case(build(MODEL, **options), batch, params, Shown(build, (), (loss_fn,), paper, script))


def critic(paper, script, demonstrations=(), **options):
    objective = actor_critic(MODEL, shared_critic, **options)
    losses = (partial(clipped_policy_loss, **{k: v for k, v in options.items() if "clip" in k}), clipped_value_loss)
    shown = Shown(actor_critic, (gae,), losses, paper, script, kl_in_reward=True)
    return Case(objective, PolicyBatch(ppo_experience(), *demonstrations), CRITIC, shown)


@functools.cache
def objective_of(loss_fn, aggregate, **options):
    """One for all rows that differ in their advantages alone, so that they are compiled once."""
    return policy_gradient(MODEL, loss_fn, aggregate=aggregate, **options)


def group(
    paper,
    script,
    loss_fn,
    aggregate=sequence_mean,
    signal=group_relative,
    kl_in_reward=0.0,
    mask=UNEVEN,
    demonstrations=(),
    **options,
):
    signal = of_a_group(signal)
    advantages = advantages_of(signal, kl_in_reward)
    experience = Experience(TOKENS, SEGMENTS, mask, OLD, advantages, ref_logprobs=REF)
    batch = PolicyBatch(experience, *demonstrations)
    losses = (loss_fn, aggregate, *([options["kl_fn"]] if "kl_fn" in options else []))
    shown = Shown(policy_gradient, (signal,), losses, paper, script and f"grpo.py --grpo.{script}", kl_in_reward > 0)
    objective = objective_of(loss_fn, aggregate, **options)
    return Case(objective, batch, {"policy": POLICY}, shown, on_policy=aggregate)


def direct(paper, script, loss_fn, beta, inputs_fn=against_reference, **options):
    shown = Shown(preference, (inputs_fn,), (loss_fn,), paper, f"dpo.py --dpo.{script}")
    return Case(preference(MODEL, loss_fn, beta=beta, inputs_fn=inputs_fn, **options), PAIRS, POLICY, shown)


def minus_greedy(rewards, mask):
    return jnp.where(mask, rewards_to_go(rewards, mask) - 0.3, 0.0)


CRITIC = {"policy": POLICY, "critic": {"head": init_value_head(tiny.CONFIG.model_dim)}}
REWARD = tiny.init_frozen().reward_params
ATTRIBUTES = {**REWARD, "head": init_attribute_head(jax.random.key(4), tiny.CONFIG.model_dim, 3)}
PTX = (DEMONSTRATIONS, jnp.full((B,), 0.3))
SUM, LENGTH = partial(constant_length_mean, length=1), 5
CASES = {
    "SFT": rewards_of("Ouyang et al. 2022", sft, sft, DEMONSTRATIONS, POLICY, "sft.py"),
    "reward model, all pairs": rewards_of(
        "Ouyang et al. 2022",
        reward_model,
        pairwise_ranking_loss,
        rankings(),
        REWARD,
        "reward_model.py",
        centering_coef=0.01,
    ),
    "reward model, first choice": rewards_of(
        "Ziegler et al. 2019",
        reward_model,
        first_choice_loss,
        rankings(),
        REWARD,
        "reward_model.py --reward.ranking-loss first_choice",
        ranking_loss=first_choice_loss,
    ),
    "reward model, Plackett-Luce": rewards_of(
        "Plackett 1975",
        reward_model,
        plackett_luce_loss,
        rankings(),
        REWARD,
        "reward_model.py --reward.ranking-loss plackett_luce",
        ranking_loss=plackett_luce_loss,
    ),
    "reward model, attributes": rewards_of(
        "Wang et al. 2023", attribute_regression, regression_loss, attributes(), ATTRIBUTES
    ),
    "process rewards": rewards_of("Lightman et al. 2023", process_reward, step_reward_loss, steps(), REWARD),
    "PPO": critic("Schulman et al. 2017", "ppo.py"),
    "PPO, dual clip, entropy bonus": critic("Ye et al. 2020", "", dual_clip=3.0, entropy_coef=0.01),
    "PPO-ptx": critic("Ouyang et al. 2022", "ppo.py --ppo.ptx-coef 1", PTX),
    "GRPO": group("Shao et al. 2024", "method grpo", clipped_policy_loss),
    "GRPO, KL in the loss": group("Shao et al. 2024", "", clipped_policy_loss, kl_coef=0.2, kl_fn=k3_straight_through),
    "GRPO-ptx": group("Ouyang et al. 2022", "ptx-coef 1", clipped_policy_loss, demonstrations=PTX),
    "Dr. GRPO": group(
        "Liu et al. 2025",
        "method dr_grpo",
        clipped_policy_loss,
        partial(constant_length_mean, length=LENGTH),
        partial(group_relative, scale=False),
    ),
    "Lite PPO": group("Liu et al. 2025", "method lite_ppo", clipped_policy_loss, token_mean, batch_relative),
    "DAPO": group(  # the second group has no spread and is masked
        "Yu et al. 2025",
        "method dapo",
        partial(clipped_policy_loss, clip_high=0.28),
        token_mean,
        mask=MASK & (jnp.arange(B) < G)[:, None],
    ),
    "GSPO": group("Zheng et al. 2025", "method gspo", gspo_loss),
    "GSPO-token": group("Zheng et al. 2025", "", gspo_loss, signal=rewards_to_go),
    "CISPO": group("MiniMax 2025", "method cispo", cispo_loss, token_mean),
    "RLOO": group("Ahmadian et al. 2024", "method rloo", reinforce_loss, SUM, leave_one_out, kl_in_reward=0.1),
    "RLOO, clipped by the completion": group(
        "Ahmadian et al. 2024", "method rloo_sequence", clipped_sequence_loss, SUM, leave_one_out, kl_in_reward=0.1
    ),
    "REINFORCE++": group(
        "Hu 2025",
        "method reinforce_plus_plus",
        clipped_policy_loss,
        token_mean,
        reinforce_plus_plus,
        kl_in_reward=0.1,
    ),
    "REINFORCE++-baseline": group(
        "Hu 2025",
        "method reinforce_plus_plus_baseline",
        clipped_policy_loss,
        token_mean,
        reinforce_plus_plus_baseline,
        kl_coef=0.2,
        kl_fn=k2,
    ),
    "ReMax": group("Li et al. 2023", "method remax", reinforce_loss, SUM, minus_greedy, kl_in_reward=0.1),
    "RAFT": Case(
        of_policy(sft(MODEL)),
        like(lambda x: np.concatenate([x] * G), jax.jit(of_a_group(best_of_group))(GENERATION, SCORES)),
        {"policy": POLICY},
        Shown(sft, (best_of_group,), (sft,), "Dong et al. 2023", "grpo.py --grpo.method raft"),
    ),
    "online DPO": Case(
        of_policy(preference(MODEL, dpo_loss, beta=0.1)),
        ONLINE,
        {"policy": POLICY},
        Shown(preference, (best_and_worst,), (dpo_loss,), "Guo et al. 2024", "grpo.py --grpo.method online_dpo"),
    ),
    "DPO": direct("Rafailov et al. 2023", "method dpo", dpo_loss, 0.1),
    "DPO with a likelihood term": direct("Pang et al. 2024", "nll-coef 1", dpo_loss, 0.1, nll_coef=1.0),
    "cDPO": direct("Mitchell 2023", "method cdpo", partial(dpo_loss, label_smoothing=0.1), 0.1),
    "robust DPO": direct("Chowdhury et al. 2024", "method robust_dpo", robust_dpo_loss, 0.1),
    "IPO": direct("Azar et al. 2023", "method ipo", ipo_loss, 0.1),
    "IPO, means": direct("Azar et al. 2023", "method ipo_means", ipo_loss, 0.1, mean_against_reference),
    "KTO": Case(
        labelled_preference(MODEL, kto_loss),
        LABELLED,
        POLICY,
        Shown(
            labelled_preference, (against_reference,), (kto_loss,), "Ethayarajh et al. 2024", "dpo.py --dpo.method kto"
        ),
        num_micro_batches=1,  # z is the batch's
    ),
    "ORPO": direct("Hong et al. 2024", "method orpo", orpo_loss, 0.1, mean_per_token),
    "SimPO": direct("Meng et al. 2024", "method simpo", simpo_loss, 2.0, mean_per_token),
    "CPO": direct("Xu et al. 2024", "method cpo", cpo_loss, 0.1, sums_and_nll),
}
every_method = pytest.mark.parametrize("name", CASES, scope="module")  # method by method: one compiles once
RL = [name for name, case in CASES.items() if isinstance(case.batch, PolicyBatch)]
close = partial(np.testing.assert_allclose, rtol=2e-4, atol=3e-6)


def compiled(name):
    """`(params, batch) -> ((total, (weight, metrics)), gradient of the total)`."""
    return compiled_objective(CASES[name].objective)


@functools.cache
def compiled_objective(objective):
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
    masks = [part.__dict__[m] for m in ("mask", "loss_mask", "completion_mask", "step_mask") if _fits(part, m)]
    mask = np.asarray(masks[0] if masks else part.mask)  # or that of what is rated
    seen = np.asarray(part.segment_ids) > 0
    if isinstance(part, PreferenceBatch):  # a masked pair may be anything
        seen &= np.asarray(part.mask)[:, None, None]
    changed = {"tokens": np.where(seen, part.tokens, rng.integers(0, 3, part.tokens.shape))}
    numbers = {"old_logprobs", "advantages", "old_values", "returns", "ref_logprobs", "labels", "targets"}
    for name in names & numbers:
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
    assert max(np.abs(leaf).max() for leaf in leaves) > 1e-3


@every_method
@pytest.mark.parametrize("change", [on_the_left, garbage])
def test_padding_and_what_is_masked_change_nothing(name, change):
    case = CASES[name]
    changed = each_part(change, case.batch)
    different = jax.tree.map(lambda a, b: not np.array_equal(a, b), changed, case.batch)
    assert any(jax.tree.leaves(different))
    jax.tree.map(close, compiled(name)(case.params, changed), outcome(name))


@functools.cache
def compiled_step(objective, num_micro_batches):
    return jax.jit(make_train_step(objective, optax.sgd(1.0), num_micro_batches=num_micro_batches))


@every_method
def test_micro_batches_and_devices_change_nothing(name):
    """Two of each at once, but for KTO, whose reference point is a statistic of the batch: one micro-batch there."""
    case, optimizer, mesh = CASES[name], optax.sgd(1.0), make_mesh()
    assert mesh.shape["data"] == 2
    step = compiled_step(case.objective, case.num_micro_batches)
    start = init_train_state(jax.device_put(case.params, replicated(mesh)), optimizer)
    state, metrics = step(start, shard_batch(case.batch, mesh))
    (total, (weight, _)), gradient = jax.device_get(outcome(name))
    close(metrics["loss"], total / weight)
    scale = max(1.0, max(np.abs(leaf).max() / weight for leaf in jax.tree.leaves(gradient)))

    def same(new, old, g):
        close(new, old - g / weight, atol=3e-6 * scale)

    jax.tree.map(same, *jax.device_get((state.params, case.params)), gradient)


def test_kto_alone_depends_on_the_split():
    """Why it is exempt: halves of a batch have reference points of their own."""
    halves = [like(lambda x, at=at: x[at], LABELLED) for at in (slice(0, 4), slice(4, 8))]
    objective = jax.jit(CASES["KTO"].objective)
    totals = [objective(POLICY, half)[0] for half in halves]
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
    "REINFORCE++-baseline",
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
    moved = batch.replace(ref_logprobs=like(lambda x: np.float32(0.5) * x, batch.ref_logprobs))
    moved = case.batch.replace(experience=moved) if isinstance(case.batch, PolicyBatch) else moved
    (total, _), _ = compiled(name)(case.params, moved)
    assert (float(total) != float(outcome(name)[0][0])) == (name in WITH_REFERENCE)


@every_method
def test_a_few_steps_improve(name):
    """Rollouts: likelier where the advantage is positive, by Σ A log(new / old). Others: the loss falls."""
    case, params = CASES[name], jax.device_get(CASES[name].params)
    for _ in range(6):
        (_, (weight, _)), gradient = jax.device_get(compiled(name)(params, case.batch))
        size = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
        size += np.float32(1e-9)  # 0 once all is clipped
        params = jax.tree.map(lambda p, g, size=size: p - np.float32(0.05) * g / size, params, gradient)
    if isinstance(case.batch, PolicyBatch):
        data = jax.device_get(case.batch.experience)
        gain = logprobs_of(params["policy"], TOKENS, SEGMENTS) - np.asarray(OLD)
        gain = jnp.asarray(np.where(data.mask, gain, np.float32(0)) * data.advantages)
        assert float(case.on_policy(gain, jnp.asarray(data.mask))[0] if case.on_policy else gain.sum()) > 0
    else:
        (total, _), _ = compiled(name)(params, case.batch)
        assert float(total / weight) < float(outcome(name)[0][0] / outcome(name)[0][1][0])


def named(function):
    """A function as README names it, without the numbers that are only this file's."""
    if not isinstance(function, partial):
        return {"minus_greedy": "make_remax_experience_fn"}.get(function.__name__, function.__name__)
    given = {k: v for k, v in function.keywords.items() if (k, v) not in (("group_size", G), ("length", LENGTH))}
    options = ", ".join(f"{k}={v}" for k, v in given.items())
    return named(function.func) + (f"({options})" if options else "")


def readme_table():
    """The table in README, of the rows of this file."""
    lines = ["| method | batch | signal | loss | objective | paper | `python experiments/` |", "|---|" + 6 * "---|"]
    for name, case in CASES.items():
        objective, signal, losses, paper, script, kl_in_reward = case.shown
        batch = case.batch.experience if isinstance(case.batch, PolicyBatch) else case.batch
        cells = [f"`{type(batch).__name__}`", ", ".join(f"`{named(x)}`" for x in signal)]
        cells[1] += ", k1 in the reward" if kl_in_reward else ""
        cells.append(", ".join(f"`{named(x)}`" for x in losses if x is not objective) or "likelihood")
        if isinstance(case.batch, PolicyBatch) and case.batch.demonstrations is not None:
            cells[2] += ", likelihood"
        cells += [f"`{objective.__name__}`", paper, f"`{script}`" if script else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_readme_s_table_is_made_of_these_rows():
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")
    (found,) = re.findall(r"<!-- algorithms -->\n(.*?)<!-- /algorithms -->", text, flags=re.DOTALL)
    assert found == readme_table(), f"README's table of algorithms is not that of CASES; paste this:\n{readme_table()}"


@every_method
def test_a_row_s_paper_is_that_of_its_functions(name):
    objective, signal, losses, paper, _, _ = CASES[name].shown
    functions = [getattr(x, "func", x) for x in (objective, *signal, *losses)]
    assert any(paper in inspect.unwrap(function).__doc__ for function in functions if function.__doc__)


def test_the_scripts_take_these_commands_and_know_no_other_method():
    """And for the direct methods the script's functions are the row's."""
    dpo_methods, grpo_methods = (importlib.import_module(name) for name in ("dpo_methods", "grpo_methods"))
    found = {"dpo.py": set(), "grpo.py": set()}
    for case in CASES.values():
        script, *arguments = case.shown.script.split() or [""]
        if not script:
            continue
        module = importlib.import_module(script.removesuffix(".py"))
        config = tyro.cli(module.Config, args=arguments)
        if script in found:
            found[script].add(config.dpo.method if script == "dpo.py" else config.grpo.method)
        if script == "dpo.py":
            loss_fn, options = dpo_methods.METHODS[config.dpo.method]
            inputs_fn = options.get("inputs_fn", against_reference)
            assert (named(loss_fn), (inputs_fn,)) == (named(case.shown.losses[0]), case.shown.signal)
    assert found == {
        "dpo.py": set(get_args(get_type_hints(dpo_methods.DPOConfig)["method"])),
        "grpo.py": set(get_args(get_type_hints(grpo_methods.GRPOConfig)["method"])),
    }


def test_what_cannot_be_meant_is_refused():
    case = CASES["GRPO"]
    with pytest.raises(ValueError, match="k1 in a loss restrains nothing"):
        policy_gradient(MODEL, clipped_policy_loss, kl_coef=0.1, kl_fn=k1)
    bare = PolicyBatch(case.batch.experience.replace(ref_logprobs=None))
    with pytest.raises(ValueError, match="the experience has no ref_logprobs"):
        jax.eval_shape(CASES["GRPO, KL in the loss"].objective, case.params, bare)
    with pytest.raises(ValueError, match="the batch has no ref_logprobs"):
        jax.eval_shape(CASES["DPO"].objective, POLICY, PAIRS.replace(ref_logprobs=None))


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


if __name__ == "__main__":
    print(readme_table(), end="")
