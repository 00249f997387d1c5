"""Slots that are refilled, and prompts held once: the same tokens as without."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.generation.continuous import generate_continuously
from rlhf_jax.generation.generate import generate
from rlhf_jax.generation.sampling import sample_token
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import LayerKind
from rlhf_jax.objectives import policy_hidden, sequence_token_logprobs

NEW, SIZES = 7, (3, 5, 1, 4, 2, 5, 3)
OPTIONS = {"max_new_tokens": NEW, "eos_id": tiny.EOS, "pad_id": tiny.PAD}
LIMITS = jnp.asarray([7, 1, 3, 7, 2, 7, 5])
WINDOWS = dataclasses.replace(tiny.CONFIG, kinds=(LayerKind(), LayerKind(window=4)), layer_kinds=(0, 1))
WINDOWED = transformer.causal_model(WINDOWS)
STACKED = transformer.causal_model(dataclasses.replace(WINDOWS, layers_apart=0))
MODELS = {"argvalues": [tiny.MODEL, WINDOWED, STACKED], "ids": ["all", "window", "stacked"]}


@cache
def continuous(num_slots, refill_size, model=tiny.MODEL, **options):
    run = partial(generate_continuously, model, num_slots=num_slots, refill_size=refill_size, **OPTIONS, **options)
    return jax.jit(run)(tiny.init_params(), tiny.prompts(SIZES), jax.random.key(3), row_limits=LIMITS)


def same(one, other):
    for name in ("tokens", "segment_ids", "completion_mask", "ended"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("model", **MODELS)
def test_every_token_is_drawn_by_its_rule(model):
    """From the logits of a forward over whole rows, without a cache, token t of row q is the draw of the key (q, t)."""
    out = continuous(2, 1, model)

    @jax.jit
    def draw(params):
        hidden = policy_hidden(model, params, out.tokens, out.segment_ids)
        logits, key = model.unembed(params, hidden), jax.random.key(3)
        drawn = []
        for q in range(len(SIZES)):
            row_key = jax.random.fold_in(key, q)
            keys = jax.vmap(partial(jax.random.fold_in, row_key))(jnp.arange(NEW))
            drawn.append(jax.vmap(lambda key, x: sample_token(key, x[None]))(keys, logits[q, 4 : 4 + NEW])[0][:, 0])
        return jnp.stack(drawn), sequence_token_logprobs(model, params, out.tokens, out.segment_ids)

    (drawn, logprobs), got = jax.device_get((draw(tiny.init_params()), out))
    mask = got.completion_mask[:, 5:]
    np.testing.assert_array_equal(got.tokens[:, 5:], np.where(mask, drawn, tiny.PAD))
    np.testing.assert_allclose(got.logprobs, np.where(got.completion_mask, logprobs, 0), atol=1e-5)
    sizes = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(NEW) < sizes[:, None])
    np.testing.assert_array_equal(got.ended, [row[n - 1] == tiny.EOS for row, n in zip(drawn, sizes, strict=True)])
    assert np.all((sizes == LIMITS) | got.ended)
    assert len(set(sizes.tolist())) > 2


@pytest.mark.parametrize(("num_slots", "refill_size"), [(1, 1), (3, 2), (7, 7)])
def test_slots_change_no_sample(num_slots, refill_size):
    same(continuous(num_slots, refill_size), continuous(2, 1))


def test_greedy_is_generates():
    run = jax.jit(partial(generate, tiny.MODEL, temperature=0, **OPTIONS))
    plain = run(tiny.init_params(), tiny.prompts(SIZES), jax.random.key(0), row_limits=LIMITS)
    same(continuous(3, 2, temperature=0), plain)


@pytest.mark.parametrize("model", **MODELS)
def test_a_shared_prompt_changes_no_sample(model):
    prompts, key = tiny.prompts((3, 5, 1)), jax.random.key(1)

    @jax.jit
    def three(params):
        run = partial(generate, samples_per_prompt=4, **OPTIONS)
        shared = run(model, params, prompts, key)
        apart = run(model._replace(fork_cache=None), params, prompts, key)
        return shared, apart, sequence_token_logprobs(model, params, shared.tokens, shared.segment_ids)

    shared, apart, again = jax.device_get(three(tiny.init_params()))
    same(shared, apart)
    np.testing.assert_allclose(shared.logprobs, np.where(shared.completion_mask, again, 0), atol=1e-5)


def test_the_prompt_is_held_once():
    empty = tiny.MODEL.init_cache(3, 5)
    apart, stacked = (jax.eval_shape(lambda m=m: m.fork_cache(m.init_cache(3, 5), 4, NEW)) for m in (WINDOWED, STACKED))
    assert [x.shape for x in (*apart.past.keys, *apart.past.values)] == [(3, 2, 5, 4)] * 4
    assert [x.shape for x in (*apart.keys, *apart.values)] == [(12, 2, NEW, 4)] * 4
    assert stacked.past.keys.shape == (2, 3, 2, 5, 4)
    assert stacked.keys.shape == (2, 12, 2, NEW, 4)
    with pytest.raises(ValueError, match="forked already"):
        tiny.MODEL.fork_cache(tiny.MODEL.fork_cache(empty, 2, 1), 2, 1)


def test_what_cannot_be_meant_is_refused():
    run = partial(generate_continuously, params={}, prompts=tiny.prompts(), key=jax.random.key(0), **OPTIONS)
    with pytest.raises(ValueError, match="the model has no refill_cache; fix"):
        run(tiny.MODEL._replace(refill_cache=None), num_slots=2)
    with pytest.raises(ValueError, match="num_slots 0"):
        run(tiny.MODEL, num_slots=0)
