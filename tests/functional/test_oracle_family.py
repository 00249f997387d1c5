"""The critic-free and the direct methods, made of this floor's functions alone, on the problem of `test_oracle.py`.

RLOO, REINFORCE++ and GRPO without its division, with k1 in the reward, must find π* = ref exp(r/β) / Z. So must DPO and IPO
on pairs sampled from the reference; each for the annotators that its derivation assumes. DPO's answer by the Bradley-Terry
law P(y ≻ y') = σ(r - r'). IPO's optimum is ref exp(E_y'[P(y ≻ y')] / τ) / Z, the reward replaced by the mean preference:
that is the same policy if preferences are linear in the reward, P = ½ + s (r - r'), and τ = s β. Bradley-Terry answers give
IPO another policy, which the control shows. Every pair carries its annotators' probabilities, so which pairs were
sampled is all that is random.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functional.tabular import completion_logprobs, logprobs
from functional.test_oracle import ALL, EVERY_PASS, PROBLEM, objective, optimum

from rlhf_jax.functional import (
    clipped_policy_loss,
    dpo_loss,
    group_relative,
    ipo_loss,
    leave_one_out,
    masked_mean,
    reinforce_plus_plus,
    shape_rewards,
)

BATCH, GROUP, NUM_UPDATES, NUM_ITERATIONS, LEARNING_RATE = 2048, 8, 4, 400, 0.05
BETAS = (0.3, 1.0)
METHODS = ("RLOO", "REINFORCE++", "GRPO without std")
REF_LOGPROBS = completion_logprobs(PROBLEM.ref_table, ALL)


def all_advantages(rewards, mask):
    """`[3, B, T]`, in the order of METHODS."""
    returns = rewards.sum(axis=1)
    rows = leave_one_out(returns, group_size=GROUP), group_relative(returns, group_size=GROUP, scale=False)
    rloo, grpo = (jnp.where(mask, x[:, None], 0.0) for x in rows)
    return jnp.stack([rloo, reinforce_plus_plus(rewards, mask), grpo])


def loss(table, batch):
    completions, old_logprobs, advantages = batch
    return masked_mean(clipped_policy_loss(logprobs(table, completions), old_logprobs, advantages), completions.mask)


def train(method, beta, key):
    """Final logits of the policy, `[num_prefixes, V]`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, NUM_ITERATIONS * NUM_UPDATES), eps=1e-5)

    def update(state, minibatch):
        table, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(table, minibatch), opt_state, table)
        return (optax.apply_updates(table, updates), opt_state), None

    def iteration(state, key):
        table = state[0]
        cumulative = jnp.cumsum(jnp.exp(completion_logprobs(table, ALL)))
        rows = jnp.searchsorted(cumulative, jax.random.uniform(key, (BATCH,)) * cumulative[-1])
        completions = jax.tree.map(lambda x: x[rows], ALL)
        old, ref = logprobs(table, completions), logprobs(PROBLEM.ref_table, completions)
        rewards = shape_rewards(PROBLEM.scores[rows], old, ref, completions.mask, kl_coef=beta)
        batch = completions, old, all_advantages(rewards, completions.mask)[method]
        minibatches = jax.tree.map(lambda x: x.reshape(NUM_UPDATES, -1, *x.shape[1:]), batch)
        return jax.lax.scan(update, state, minibatches)[0], None

    state = PROBLEM.ref_table, optimizer.init(PROBLEM.ref_table)
    return jax.lax.scan(iteration, state, jax.random.split(key, NUM_ITERATIONS))[0][0]


def compare(table, beta):
    """`(J, J*, total variation)`, exact, in float64."""
    ref, found = np.float64(REF_LOGPROBS), np.float64(completion_logprobs(table, ALL))
    best_logprobs, best = optimum(ref, beta)
    distance = 0.5 * np.abs(np.exp(found) - np.exp(best_logprobs)).sum()
    return objective(np.exp(found), found, ref, beta), best, float(distance)


CASES = [(method, beta) for method in range(len(METHODS)) for beta in BETAS]


@pytest.fixture(scope="module")
def tables():
    """All cases side by side in one compiled program."""
    methods, betas = (jnp.asarray(x) for x in zip(*CASES, strict=True))
    trained = jax.jit(jax.vmap(train), compiler_options=EVERY_PASS)(
        methods, betas, jax.random.split(jax.random.key(1), len(CASES))
    )
    return dict(zip(CASES, trained, strict=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("method", range(len(METHODS)), ids=METHODS)
def test_on_line_methods_find_the_optimum(tables, method, beta):
    value, best, distance = compare(tables[method, beta], beta)
    assert best - 0.01 <= value <= best + 1e-4, (value, best)
    assert distance < 0.03


NUM_PAIRS, NUM_STEPS = 2**14, 1000
SPAN = float(PROBLEM.scores.max() - PROBLEM.scores.min())
DIRECT = ("DPO", "IPO", "IPO on Bradley-Terry answers")


@pytest.fixture(scope="module")
def direct_tables():
    """Five policies on the same pairs in one program; each has its own table, so their gradients do not meet."""
    cumulative = jnp.cumsum(jnp.exp(REF_LOGPROBS))
    first, second = jnp.searchsorted(cumulative, jax.random.uniform(jax.random.key(2), (2, NUM_PAIRS)) * cumulative[-1])
    gap = PROBLEM.scores[first] - PROBLEM.scores[second]
    bradley_terry, linear = jax.nn.sigmoid(gap), 0.5 + gap / (2 * SPAN)
    cases = {("DPO", beta): (dpo_loss, beta, bradley_terry) for beta in BETAS}
    cases |= {("IPO", beta): (ipo_loss, beta / (2 * SPAN), linear) for beta in BETAS}
    cases["IPO on Bradley-Terry answers", 1.0] = (ipo_loss, 1 / (2 * SPAN), bradley_terry)

    def total(tables):
        losses = []
        for table, (loss_fn, beta, prefers) in zip(tables, cases.values(), strict=True):
            new = completion_logprobs(table, ALL)
            pair = new[first], new[second], REF_LOGPROBS[first], REF_LOGPROBS[second]
            turned = pair[1], pair[0], pair[3], pair[2]
            losses.append((prefers * loss_fn(*pair, beta=beta) + (1 - prefers) * loss_fn(*turned, beta=beta)).mean())
        return sum(losses)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.3, NUM_STEPS), eps=1e-12)

    def step(state, _):
        tables, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(total)(tables), opt_state)
        return (optax.apply_updates(tables, updates), opt_state), None

    start = jnp.stack([PROBLEM.ref_table] * len(cases))
    fit = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=NUM_STEPS), compiler_options=EVERY_PASS)
    (found, _), _ = fit(start)
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("method", ["DPO", "IPO"])
def test_direct_methods_find_the_optimum(direct_tables, method, beta):
    assert compare(direct_tables[method, beta], beta)[2] < 0.05


def test_ipo_on_bradley_terry_answers_finds_another_policy(direct_tables):
    """The control: the mean preference is no linear function of the reward."""
    assert compare(direct_tables["IPO on Bradley-Terry answers", 1.0], 1.0)[2] > 0.1
