"""Sampling: the sampler's log-probs are the training forward's, the noise is fresh, the lengths are right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.generation.generate import generate
from rlhf_jax.generation.sampling import filter_top_k, filter_top_p, sample_token
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.types import PromptBatch

NEW = 6


@partial(jax.jit, static_argnames=("temperature", "top_k", "top_p", "samples_per_prompt", "eos_id", "pad_id"))
def sample(params, prompts, key, row_limits=None, **options):
    options = {"eos_id": tiny.EOS, "pad_id": tiny.PAD, **options}
    return generate(tiny.MODEL, params, prompts, key, max_new_tokens=NEW, row_limits=row_limits, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_training_forward(temperature):
    params = tiny.init_params()
    out = sample(params, tiny.prompts(), jax.random.key(0), temperature=temperature)
    score = jax.jit(partial(sequence_token_logprobs, tiny.MODEL, temperature=temperature))
    again = score(params, out.tokens, out.segment_ids)
    mask = np.asarray(out.completion_mask)
    assert mask.sum() > 8
    np.testing.assert_allclose(np.asarray(out.logprobs)[mask], np.asarray(again)[mask], atol=1e-5)
    assert np.all(np.asarray(out.logprobs)[~mask] == 0)


def test_lengths_masks_and_eos():
    out = sample(tiny.init_params(), tiny.prompts((3, 5) * 16), jax.random.key(1))
    tokens, mask, segments = (np.asarray(x) for x in (out.tokens, out.completion_mask, out.segment_ids))
    for row in range(32):
        completion = tokens[row, 5:]
        ends = np.flatnonzero(completion == tiny.EOS)
        size = ends[0] + 1 if ends.size else NEW
        assert bool(out.ended[row]) == bool(ends.size)
        np.testing.assert_array_equal(mask[row], [False] * 5 + [True] * size + [False] * (NEW - size))
        assert np.all(completion[size:] == tiny.PAD)
        np.testing.assert_array_equal(segments[row, 5:], mask[row, 5:])
    assert 0 < np.asarray(out.ended).sum() < 32


def test_without_eos_only_limits_end_a_row():
    limits = jnp.asarray([6, 2] * 8)
    out = sample(tiny.init_params(), tiny.prompts((3, 5) * 8), jax.random.key(1), limits, eos_id=None)
    np.testing.assert_array_equal(out.completion_mask.sum(axis=1), limits)
    assert not np.any(out.ended)
    assert np.any(np.asarray(out.tokens)[np.asarray(out.completion_mask)] == tiny.EOS)  # a token like any other


def test_pad_may_equal_eos():
    apart = sample(tiny.init_params(), tiny.prompts((3, 5) * 8), jax.random.key(1))
    same = sample(tiny.init_params(), tiny.prompts((3, 5) * 8), jax.random.key(1), pad_id=tiny.EOS)
    np.testing.assert_array_equal(apart.completion_mask, same.completion_mask)
    np.testing.assert_array_equal(apart.logprobs, same.logprobs)


def test_wider_padding_changes_nothing():
    narrow = sample(tiny.init_params(), tiny.prompts(width=5), jax.random.key(2))
    wide = sample(tiny.init_params(), tiny.prompts(width=9), jax.random.key(2))
    np.testing.assert_array_equal(np.asarray(narrow.tokens)[:, 5:], np.asarray(wide.tokens)[:, 9:])
    np.testing.assert_allclose(np.asarray(narrow.logprobs)[:, 5:], np.asarray(wide.logprobs)[:, 9:], atol=1e-5)


def test_same_key_same_text_fresh_key_fresh_text():
    params, prompts = tiny.init_params(), tiny.prompts((3, 5) * 8)
    first = sample(params, prompts, jax.random.key(3))
    assert np.array_equal(first.tokens, sample(params, prompts, jax.random.key(3)).tokens)
    assert not np.array_equal(first.tokens, sample(params, prompts, jax.random.key(4)).tokens)


def test_samples_of_a_prompt_differ_and_stay_together():
    out = sample(tiny.init_params(), tiny.prompts((3, 5)), jax.random.key(5), samples_per_prompt=4)
    tokens = np.asarray(out.tokens)
    assert tokens.shape[0] == 8
    np.testing.assert_array_equal(tokens[:4, :5], np.repeat(tokens[:1, :5], 4, axis=0))
    np.testing.assert_array_equal(tokens[4:, :5], np.repeat(tokens[4:5, :5], 4, axis=0))
    assert len({tuple(row) for row in tokens[:4, 5:].tolist()}) > 1


def test_row_limits():
    limits = jnp.asarray([1, 2, 6, 3])
    out = sample(tiny.init_params(), tiny.prompts(), jax.random.key(6), row_limits=limits)
    sizes = np.asarray(out.completion_mask).sum(axis=1)
    assert np.all(sizes <= np.asarray(limits))
    assert np.all((sizes == np.asarray(limits)) | np.asarray(out.ended))


def test_greedy_takes_the_most_likely_token():
    params = tiny.init_params()
    out = sample(params, tiny.prompts(), jax.random.key(7), temperature=0)
    other = sample(params, tiny.prompts(), jax.random.key(8), temperature=0)
    np.testing.assert_array_equal(out.tokens, other.tokens)
    row = np.asarray(out.tokens)[0][np.asarray(out.segment_ids)[0] > 0]
    assert len(row) > 4

    @jax.jit
    def most_likely(params):
        """After every beginning of the row, from a forward that is given no more of it."""
        tokens = []
        for size in range(3, len(row)):
            positions, segments = jnp.arange(size)[None], jnp.ones((1, size), jnp.int32)
            hidden, _ = tiny.MODEL.hidden(params, jnp.asarray(row[None, :size]), positions, segments)
            tokens.append(jnp.argmax(tiny.MODEL.unembed(params, hidden[0, -1])))
        return jnp.stack(tokens)

    np.testing.assert_array_equal(most_likely(params), row[3:])


def test_decoding_stops_when_every_row_has_ended():
    """A model that always says EOS, and counts its forwards by a NaN that only a needless one would read."""
    calls = []

    def hidden(params, tokens, positions, segment_ids, cache=None):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros((*tokens.shape, 1)), cache

    model = tiny.MODEL._replace(
        hidden=hidden,
        unembed=lambda params, states: jnp.zeros((*states.shape[:-1], 3)).at[..., 1].set(50.0),
        init_cache=lambda batch_size, length: jnp.zeros(()),
    )
    run = jax.jit(partial(generate, model, max_new_tokens=100, eos_id=1, pad_id=0))
    out = run({}, tiny.prompts(), jax.random.key(0))
    jax.block_until_ready(out.tokens)
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_array_equal(np.asarray(out.completion_mask).sum(axis=1), 1)


def test_sampling_law():
    """Frequencies of 40,000 draws within 4 standard errors of the tempered, filtered law."""
    logits = jnp.asarray([1.0, 0.5, 0.0, -0.5, -1.0])
    many = np.tile(logits, (40_000, 1))
    for options, kept in [
        ({"temperature": 0.5}, [1, 1, 1, 1, 1]),
        ({"temperature": 2.0, "top_k": 3}, [1, 1, 1, 0, 0]),
        ({"top_p": 0.5}, [1, 1, 0, 0, 0]),
    ]:
        law = np.exp(np.asarray(logits) / options.get("temperature", 1.0)) * np.asarray(kept)
        law /= law.sum()
        tokens, logprobs = jax.jit(partial(sample_token, **options))(jax.random.key(9), many)
        seen = np.bincount(np.asarray(tokens), minlength=5) / 40_000
        assert np.all(np.abs(seen - law) <= 4 * np.sqrt(law * (1 - law) / 40_000)), (options, seen, law)
        tempered = jax.nn.log_softmax(logits / options.get("temperature", 1.0))
        np.testing.assert_allclose(logprobs, np.asarray(tempered)[np.asarray(tokens)], rtol=1e-5)


def rows_of_logits(vocab):
    """Random, neighbouring floats, tied, flat, peaked, extreme, zeros of both signs, tokens that are impossible already."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=vocab) * scale for scale in (0.1, 2.0, 30.0, 1e30)]
    rows += [
        1.0 + 2.0**-23 * np.arange(vocab),
        rng.integers(-2, 3, vocab),
        np.zeros(vocab),
        np.where(np.arange(vocab) == 3, 50.0, -0.0),
    ]
    rows += [
        np.where(rng.random(vocab) < 0.5, -np.inf, rng.normal(size=vocab)),
        -np.abs(rng.normal(size=vocab)) - 1e-30,
    ]
    return np.asarray(rows, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_filters_against_a_loop(dtype):
    logits = jnp.asarray(rows_of_logits(23), dtype)
    rows = np.asarray(logits.astype(jnp.float32), np.float64)
    for p in (0.1, 0.6, 0.95):
        kept = np.asarray(jax.jit(partial(filter_top_p, p=p))(logits) > -jnp.inf)
        for row, keep in zip(rows, kept, strict=True):
            probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            before = np.asarray([probabilities[row > x].sum() for x in row])
            assert np.abs(before - p).min() > 1e-6, "an accident of the numbers: this row decides nothing"
            np.testing.assert_array_equal(keep, (before < p) & (row > -np.inf))
    for k in (1, 2, 22, 23):
        kept = np.asarray(jax.jit(partial(filter_top_k, k=k))(logits) > -jnp.inf)
        for row, keep in zip(rows, kept, strict=True):
            np.testing.assert_array_equal(keep, (row >= np.sort(row)[-k]) & (row > -np.inf))
    everything = jax.jit(partial(filter_top_p, p=1.0))(logits)
    np.testing.assert_array_equal(everything[:2], logits[:2])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"top_k must lie in 1\.\.5"):
        filter_top_k(jnp.zeros((1, 5)), 9)
    with pytest.raises(ValueError, match="top_p must lie in"):
        filter_top_p(jnp.zeros((1, 5)), 0.0)
    empty = PromptBatch(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        generate(tiny.MODEL, {}, empty, jax.random.key(0), max_new_tokens=0, eos_id=1, pad_id=0)
