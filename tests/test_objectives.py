"""Objectives do not see padding: left, right or longer, packed or apart, with ids of its own or those of real tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.data import chat
from rlhf_jax.data.batching import demonstration_batch, packed_demonstration_batch, ranking_batch
from rlhf_jax.data.preferences import dense_ranks, read_rankings
from rlhf_jax.data.records import TokenizedDemonstration, TokenizedRanking
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.functional import first_choice_loss, pairwise_ranking_loss, plackett_luce_loss, regression_loss
from rlhf_jax.models import transformer
from rlhf_jax.models.heads import (
    combine_attributes,
    init_attribute_head,
    scalar_head,
    sequence_attributes,
    sequence_scores,
)
from rlhf_jax.objectives import (
    AttributeBatch,
    PolicyBatch,
    StepBatch,
    actor_critic,
    attribute_regression,
    policy_hidden,
    process_reward,
    reward_model,
    separate_critic,
    sft,
)
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Experience

EXAMPLES = [
    TokenizedDemonstration((5, 6), (7, tiny.EOS)),
    TokenizedDemonstration((4,), (2, 3, tiny.EOS)),
    TokenizedDemonstration((8, 9, 2), (16,)),
]
RANKINGS = [
    TokenizedRanking((5, 6), ((7, tiny.EOS), (tiny.EOS,)), (1, 0)),
    TokenizedRanking((4,), ((2, tiny.EOS), (3, tiny.EOS), (2, 3, tiny.EOS)), (0, 1, 1)),
]
SEQUENCES = {"pad_id": tiny.PAD, "vocab_size": tiny.VOCAB}
REWARD_PARAMS = tiny.init_frozen().reward_params


def demonstrations(length=6, **options):
    return demonstration_batch(EXAMPLES, length=length, **{**SEQUENCES, **options})


def rankings(length=6, **options):
    return ranking_batch(RANKINGS, length=length, num_responses=3, **{**SEQUENCES, **options})


def experience(length=6) -> PolicyBatch:
    rows, rng = demonstrations(length), np.random.default_rng(0)
    values = np.zeros((4, 3, length), np.float32)
    values[:, :, :6] = rng.normal(size=(4, 3, 6))
    kept = {"tokens": rows.tokens, "segment_ids": rows.segment_ids, "mask": rows.loss_mask}
    names = ("old_logprobs", "old_values", "advantages", "returns")
    return PolicyBatch(Experience(**kept, **{name: v for name, v in zip(names, values, strict=True)}))


ATTRIBUTE_PARAMS = {
    "trunk": REWARD_PARAMS["trunk"],
    "head": init_attribute_head(jax.random.key(4), tiny.CONFIG.model_dim, 2),
}
TARGETS = np.array([[1.0, np.nan], [0.5, -2.0], [np.nan, 3.0]], np.float32)


def attributes(length=6, **options):
    rows = demonstrations(length, **options)
    return AttributeBatch(rows.tokens, rows.segment_ids, TARGETS, ~np.isnan(TARGETS))


def steps(length=6, **options):
    """Every second completion token ends a step, the first of them a good one."""
    rows = demonstrations(length, **options)
    ends = rows.loss_mask & (np.cumsum(rows.loss_mask, axis=1) % 2 == 1)
    return StepBatch(rows.tokens, rows.segment_ids, (np.cumsum(ends, axis=1) == 1).astype(np.float32), ends)


def on_the_left(batch):
    """The same rows, each moved to the end of a longer row."""

    def shift(x, segments):
        if x.shape != segments.shape:
            return x
        moved = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)  # as long as the other variants: one compilation
        for row in np.ndindex(x.shape[:-1]):
            size = int((segments[row] > 0).sum())
            moved[row][moved.shape[-1] - size :] = x[row][:size]
        return moved

    segments = np.asarray((batch.experience if isinstance(batch, PolicyBatch) else batch).segment_ids)
    return jax.tree.map(lambda x: shift(np.asarray(x), segments), batch)


def garbage(batch):
    """Padding whose ids are real tokens, the end of sequence among them."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 3, batch.tokens.shape)
    return batch.replace(tokens=np.where(batch.segment_ids > 0, batch.tokens, ids))


CASES = {
    "sft": (sft(tiny.MODEL), tiny.init_params(), demonstrations),
    "last token": (reward_model(tiny.MODEL, centering_coef=0.1), REWARD_PARAMS, rankings),
    "mean over completion": (reward_model(tiny.MODEL, mean_over_completion=True), REWARD_PARAMS, rankings),
    "Plackett-Luce": (reward_model(tiny.MODEL, ranking_loss=plackett_luce_loss), REWARD_PARAMS, rankings),
    "attributes": (attribute_regression(tiny.MODEL), ATTRIBUTE_PARAMS, attributes),
    "steps": (process_reward(tiny.MODEL), REWARD_PARAMS, steps),
    "actor critic": (
        actor_critic(tiny.MODEL, separate_critic(tiny.MODEL), entropy_coef=0.1),
        {"policy": tiny.init_params(), "critic": {"trunk": tiny.init_params(1), "head": REWARD_PARAMS["head"]}},
        experience,
    ),
}


def variants(name):
    build = CASES[name][2]
    yield build(length=9)
    yield on_the_left(build())
    if name == "actor critic":
        batch = build(length=9)
        yield batch.replace(experience=garbage(batch.experience))
    else:
        yield build(length=9, pad_id=tiny.EOS)
        yield garbage(build(length=9))
        yield garbage(on_the_left(build()))
    if name == "sft":
        packed = packed_demonstration_batch(EXAMPLES, length=12, **SEQUENCES)
        assert len(packed.tokens) == 1
        yield packed


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_no_loss_and_no_gradient(name):
    objective, params, build = CASES[name]

    @jax.jit
    def loss_and_gradient(batch):
        def loss(p):
            total, weight, metrics = objective(p, batch)
            return total / weight, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = loss_and_gradient(jax.tree.map(jnp.asarray, build()))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1])) > 1e-2
    for batch in variants(name):
        found = loss_and_gradient(jax.tree.map(jnp.asarray, batch))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected)


@jax.jit
def values_of(tokens, segment_ids):
    """The head's value at every token."""
    return scalar_head(REWARD_PARAMS["head"], policy_hidden(tiny.MODEL, REWARD_PARAMS["trunk"], tokens, segment_ids))


def test_mean_over_completion_is_the_mean_of_the_heads_values():
    """One pair by hand: the loss is -log σ of the difference of two plain means."""
    batch = jax.tree.map(jnp.asarray, ranking_batch(RANKINGS[:1], length=5, num_responses=2, **SEQUENCES))
    means = []
    for prompt, response in [((5, 6), (7, tiny.EOS)), ((5, 6), (tiny.EOS,))]:
        row = np.asarray([prompt + response])
        means.append(float(np.mean(values_of(row, np.ones_like(row))[0, 2:])))
    total, weight, metrics = jax.jit(reward_model(tiny.MODEL, mean_over_completion=True))(REWARD_PARAMS, batch)
    np.testing.assert_allclose(total / weight, np.log1p(np.exp(means[0] - means[1])), rtol=1e-5)
    np.testing.assert_allclose(metrics["rm/margin"][0], means[1] - means[0], rtol=1e-4)


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


scores_of_rows = jax.jit(partial(sequence_scores, tiny.MODEL))


def scores_of(batch):
    flat = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segment_ids)]
    return np.asarray(scores_of_rows(REWARD_PARAMS, *flat)).reshape(batch.ranks.shape)


def test_the_default_ranking_loss_is_the_pairwise_one():
    batch = on_device(rankings())
    for one, other in zip(
        jax.tree.leaves(jax.jit(reward_model(tiny.MODEL))(REWARD_PARAMS, batch)),
        jax.tree.leaves(jax.jit(reward_model(tiny.MODEL, ranking_loss=pairwise_ranking_loss))(REWARD_PARAMS, batch)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("loss", [plackett_luce_loss, first_choice_loss])
def test_a_ranking_loss_is_averaged_over_prompts_that_prefer_something(loss):
    batch = rankings()
    objective = jax.jit(reward_model(tiny.MODEL, ranking_loss=loss))
    total, weight, metrics = objective(REWARD_PARAMS, on_device(batch))
    losses = jax.jit(loss)(scores_of(batch), batch.ranks, batch.mask)
    np.testing.assert_allclose(total / weight, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["rm/loss"], (total, weight))
    tied = batch.replace(ranks=np.array([[1, 0, 0], [2, 2, 2]], np.int32))
    total, weight, _ = objective(REWARD_PARAMS, on_device(tied))
    assert weight == 1
    np.testing.assert_allclose(total, losses[0], rtol=1e-5)


def test_coefficients_of_a_loss_that_is_not_used_are_refused():
    for options in ({"label_smoothing": 0.1}, {"centering_coef": 0.1}):
        with pytest.raises(ValueError, match="belong to the default loss"):
            reward_model(tiny.MODEL, ranking_loss=plackett_luce_loss, **options)


attributes_of = jax.jit(partial(sequence_attributes, tiny.MODEL))


def test_attributes_are_regressed_where_people_gave_them():
    batch = on_device(attributes())
    predictions = np.asarray(attributes_of(ATTRIBUTE_PARAMS, batch.tokens, batch.segment_ids))
    assert predictions.shape == (3, 2)
    labelled = ~np.isnan(TARGETS)
    errors = (predictions - TARGETS)[labelled]
    total, weight, metrics = jax.jit(attribute_regression(tiny.MODEL))(ATTRIBUTE_PARAMS, batch)
    assert weight == 4
    np.testing.assert_allclose(total / weight, np.mean(errors**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["rm/abs_error"][0], np.abs(errors).sum(), rtol=1e-5)


def test_a_weighted_sum_of_attributes_is_a_reward_model():
    weights, batch = jnp.asarray([0.3, -2.0]), on_device(attributes())
    rows = (batch.tokens, batch.segment_ids)
    head = jax.tree.map(lambda x: x + 0.1, ATTRIBUTE_PARAMS["head"])  # a bias that is not 0
    params = {**ATTRIBUTE_PARAMS, "head": head}
    expected = np.asarray(attributes_of(params, *rows)) @ weights
    scalar = {**params, "head": combine_attributes(head, weights)}
    np.testing.assert_allclose(scores_of_rows(scalar, *rows), expected, rtol=1e-5)


def test_steps_are_judged_on_their_last_token():
    batch = steps()
    read = np.asarray(values_of(batch.tokens, batch.segment_ids), np.float64)[batch.step_mask]
    labels = batch.labels[batch.step_mask]
    assert len(labels) == 4
    assert set(labels) == {0.0, 1.0}
    total, weight, metrics = jax.jit(process_reward(tiny.MODEL))(REWARD_PARAMS, on_device(batch))
    assert weight == 4
    np.testing.assert_allclose(total, np.logaddexp(0, np.where(labels > 0, -read, read)).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rm/accuracy"][0], ((read > 0) == (labels > 0)).sum())
    regression = jax.jit(process_reward(tiny.MODEL, step_loss=regression_loss, threshold=0.5))
    total, _, metrics = regression(REWARD_PARAMS, on_device(batch))
    np.testing.assert_allclose(total, np.sum((read - labels) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["rm/accuracy"][0], ((read > 0.5) == (labels > 0)).sum())


RANKING_FILES = ("oasst_en100", "qa_feedback_dev", "topical_chat_usr", "cnndm_ratings")


def short(tokenizer, ranking):
    """The end of the prompt and the beginnings of the responses."""
    prompt, responses, ranks = chat.encode_ranking(tokenizer, ranking)
    return TokenizedRanking(prompt[-8:], tuple(response[:24] for response in responses), ranks)


def test_people_s_rankings_train_whatever_their_number_and_ties(data_dir):
    """Each file alone, then all in one batch with every number of responses from 2 to 9, and ties."""
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(tiny.CONFIG, vocab_size=tokenizer.vocab_size)
    params = {"trunk": transformer.init(jax.random.key(0), config), "head": REWARD_PARAMS["head"]}
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(reward_model(transformer.causal_model(config)), optimizer))
    files = {name: read_rankings(data_dir / f"rankings/{name}.jsonl.gz")[0] for name in RANKING_FILES}
    groups = {name: records[:12] for name, records in files.items()}
    by_size = {len(record.ranks): record for records in files.values() for record in records}
    for size in (7, 8):  # none in the files
        nine = by_size[9]
        by_size[size] = dataclasses.replace(nine, responses=nine.responses[:size], ranks=dense_ranks(nine.ranks[:size]))
    tied = [record for record in files["cnndm_ratings"] if 1 < len(set(record.ranks)) < len(record.ranks)]
    groups["mixed"] = [*by_size.values(), *tied][:12]
    assert sorted({len(record.ranks) for record in groups["mixed"]}) == list(range(2, 10))
    assert any(len(set(record.ranks)) < len(record.ranks) for record in groups["mixed"])
    for name, records in groups.items():
        batch = ranking_batch(
            [short(tokenizer, record) for record in records],
            length=32,
            num_responses=9,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
        )
        state, losses = init_train_state(params, optimizer), []
        for _ in range(8):
            state, metrics = step(state, on_device(batch))
            assert metrics["grad/finite"] == 1
            losses.append(float(metrics["rm/loss"]))
        assert np.all(np.isfinite(losses)), name
        assert losses[-1] < losses[0] - 0.05, (name, losses)
