"""Comparisons that run their prompt once, against the plain objectives: losses, metrics, gradients, and what does not fit."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.functional.preference_inputs import mean_per_token
from rlhf_jax.functional.preference_losses import dpo_loss, kto_loss, simpo_loss
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import LayerKind
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.objectives import (
    SharedPrompts,
    labelled_preference,
    pair_token_logprobs,
    preference,
    reward_model,
    shared_sizes,
)
from rlhf_jax.runtime.flops import matmul_flops
from rlhf_jax.runtime.metrics import check_finite
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import LabelledBatch, PreferenceBatch, RankingBatch

CONFIG = dataclasses.replace(tiny.CONFIG, unroll=2)
WINDOWS = {"kinds": (LayerKind(), LayerKind(window=3)), "layer_kinds": (0, 1)}
NETWORKS = {
    "Llama": CONFIG,
    "windows": dataclasses.replace(CONFIG, **WINDOWS, qk_norm=True, attention_softcap=5.0),
    "stacked": dataclasses.replace(CONFIG, layers_apart=0),
    "chunks": dataclasses.replace(CONFIG, logits_chunk=8),
    "last layer": dataclasses.replace(CONFIG, last_layer_where_read=True),
}
LENGTH = 11
PROMPTS, ANSWERS = (3, 5, 1, 4), ((2, 5, 1, 3), (4, 4, 2, 6), (6, 1, 3, 2), (2, 2, 2, 2))
SIZES = SharedPrompts(prompt=5, completion=6)


def rows(num_responses: int, pad_left: bool):
    """Tokens, segments and completion mask `[4, K, T]`; the third prompt has one response less, if there are more than 2."""
    rng = np.random.default_rng(0)
    tokens, segments = np.zeros((2, 4, num_responses, LENGTH), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b, size in enumerate(PROMPTS):
        prompt = rng.integers(2, tiny.VOCAB, size)
        for k in range(num_responses - (b == 2 and num_responses > 2)):
            row = np.concatenate([prompt, rng.integers(2, tiny.VOCAB, ANSWERS[b][k])])
            start = LENGTH - len(row) if pad_left else 0
            tokens[b, k, start : start + len(row)], segments[b, k, start : start + len(row)] = row, 1
            mask[b, k, start + size : start + len(row)] = True
    return jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(mask)


def rankings(num_responses: int, pad_left: bool) -> RankingBatch:
    tokens, segments, mask = rows(num_responses, pad_left)
    ranks = jnp.asarray([[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 9], [1, 0, 3, 2]])[:, :num_responses]
    return RankingBatch(tokens, segments, mask, ranks=ranks, mask=jnp.any(mask, axis=2))


def pairs(pad_left: bool, model, params) -> PreferenceBatch:
    batch = PreferenceBatch(*rows(2, pad_left), mask=jnp.asarray([True, True, False, True]))
    return batch.replace(ref_logprobs=pair_token_logprobs(model, params, batch))


def scorer(config):
    return {
        "trunk": transformer.init(jax.random.key(0), config),
        "head": init_reward_head(jax.random.key(2), config.model_dim),
    }


def everything(objective, params, batch):
    """Total, weight and metrics, and the gradient."""

    def of(params):
        total, weight, metrics = objective(params, batch)
        return total, (total, weight, metrics)

    gradient, found = jax.grad(of, has_aux=True)(params)
    return found, gradient


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))


def losses(model, params, reference, shared):
    """Of rankings of four with a place that is empty, and of pairs against a reference: what `everything` says of them."""
    yield everything(reward_model(model, shared=shared), params, rankings(4, False))
    batch = pairs(True, model, reference)
    yield everything(preference(model, dpo_loss, beta=0.1, shared=shared), params["trunk"], batch)


def other_losses(model, params, reference, shared):
    """Two responses, the mean over their tokens, means of log-probs without a reference, KTO."""
    yield everything(reward_model(model, shared=shared), params, rankings(2, True))
    yield everything(reward_model(model, shared=shared, mean_over_completion=True), params, rankings(4, True))
    batch = pairs(False, model, reference)
    options = {"beta": 2.0, "inputs_fn": mean_per_token, "nll_coef": 0.5}
    yield everything(preference(model, simpo_loss, **options, shared=shared), params["trunk"], batch)
    labels = {"desirable": jnp.asarray([True, False, True, True]), "ref_logprobs": batch.ref_logprobs}
    labelled = LabelledBatch(batch.tokens, batch.segment_ids, batch.completion_mask, **labels)
    yield everything(labelled_preference(model, kto_loss, shared=shared), params["trunk"], labelled)


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_the_plain_objectives(name):
    """Totals, weights, metrics and gradients."""
    config, model = NETWORKS[name], transformer.causal_model(NETWORKS[name])
    kinds = (losses, other_losses) if name == "Llama" else (losses,)

    def run():
        params, reference = scorer(config), transformer.init(jax.random.key(1), config)
        return [[list(kind(model, params, reference, shared)) for kind in kinds] for shared in (None, SIZES)]

    plain, shared = jax.jit(run)()
    close(shared, plain)


def test_log_probs_come_back_where_they_were():
    params = tiny.init_params()
    batch = PreferenceBatch(*rows(2, True), mask=jnp.ones((4,), bool))
    plain, shared = (pair_token_logprobs(tiny.MODEL, params, batch, sizes) for sizes in (None, SIZES))
    close(shared, np.where(batch.completion_mask, plain, 0.0))
    assert np.all(np.asarray(shared)[~np.asarray(batch.completion_mask)] == 0)


def test_sizes():
    assert shared_sizes(*rows(4, True)) == shared_sizes(*rows(4, False)) == SharedPrompts(5, 6)
    assert shared_sizes(*(x[2:3] for x in rows(2, True))) == SharedPrompts(1, 6)


@pytest.mark.parametrize(
    ("sizes", "spoil"),
    [(SharedPrompts(4, 6), False), (SharedPrompts(5, 5), False), (SIZES, True)],
    ids=["prompt too long", "response too long", "different prompts"],
)
def test_what_does_not_fit_is_nan(sizes, spoil):
    """In the loss and in the gradient, so that no step is taken."""
    batch = rankings(2, False)
    if spoil:
        batch = batch.replace(tokens=batch.tokens.at[1, 1, 2].add(1))
    params = scorer(CONFIG)
    (found, _, _), gradient = everything(reward_model(tiny.MODEL, shared=sizes), params, batch)
    assert np.isnan(found)
    assert all(np.isnan(x).any() for x in jax.tree.leaves(gradient))
    pair = PreferenceBatch(batch.tokens, batch.segment_ids, batch.completion_mask, mask=jnp.ones((4,), bool))
    logprobs = np.asarray(pair_token_logprobs(tiny.MODEL, params["trunk"], pair, sizes))
    assert np.isnan(logprobs).any()
    assert np.isfinite(logprobs[3]).all()


def test_a_batch_that_does_not_fit_moves_nothing():
    """The step hands the state back and says so, and the host raises."""
    optimizer = optax.sgd(0.1)
    objective = reward_model(tiny.MODEL, shared=SharedPrompts(5, 5))
    state = init_train_state(scorer(CONFIG), optimizer)
    after, metrics = jax.jit(make_train_step(objective, optimizer))(state, rankings(2, False))
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(FloatingPointError, match="the gradient"):
        check_finite({name: float(x) for name, x in metrics.items()}, stage="rm", step=0)


@pytest.mark.parametrize("place", [0, 3])
def test_a_masked_place_may_hold_anything(place):
    """Another prompt, or a response too long: what is masked out of a ranking is not compared, and not learned from."""
    batch = rankings(4, False)
    spoilt = batch.replace(
        tokens=batch.tokens.at[0, place, 1].add(1).at[1, place, 1].add(1),
        segment_ids=batch.segment_ids.at[0, place].set(1),
        completion_mask=batch.completion_mask.at[0, place, 3:].set(True),
        mask=batch.mask.at[:2, place].set(False),
    )
    params = scorer(CONFIG)
    plain, shared = (everything(reward_model(tiny.MODEL, shared=s), params, spoilt) for s in (None, SIZES))
    close(shared, plain)


def test_a_model_that_cannot_fork():
    objective = reward_model(tiny.MODEL._replace(fork_cache=None), shared=SIZES)
    with pytest.raises(ValueError, match="fork_cache"):
        objective(scorer(CONFIG), rankings(2, True))


@pytest.mark.parametrize("name", ["rankings", "pairs", "labelled"])
def test_the_prompt_is_run_once(name):
    """Of a network's products with weights, those of the prompt's second run are gone."""
    tokens, segments, mask = rows(2, True)
    options = {"ref_logprobs": jnp.zeros(tokens.shape)}
    every = jnp.ones((4,), bool)

    def loss(params, shared):
        if name == "rankings":
            return reward_model(tiny.MODEL, shared=shared)(params, rankings(2, True))[0]
        if name == "pairs":
            batch = PreferenceBatch(tokens, segments, mask, mask=every, **options)
            return preference(tiny.MODEL, dpo_loss, beta=0.1, shared=shared)(params["trunk"], batch)[0]
        batch = LabelledBatch(tokens, segments, mask, desirable=every, **options)
        return labelled_preference(tiny.MODEL, kto_loss, shared=shared)(params["trunk"], batch)[0]

    params = jax.eval_shape(lambda: scorer(CONFIG))
    plain, shared = (matmul_flops(partial(loss, shared=sizes), params) for sizes in (None, SIZES))
    c = CONFIG
    per_column = c.model_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 3 * c.model_dim * c.mlp_dim
    saved = 2 * 4 * (2 * LENGTH - SIZES.prompt - 2 * SIZES.completion) * c.num_layers * per_column
    assert plain - shared > 0.9 * saved
