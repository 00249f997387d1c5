"""Objectives do not see padding: left, right or longer, packed or apart, with ids of its own or those of real tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.data.batching import demonstration_batch, packed_demonstration_batch, ranking_batch
from rlhf_jax.data.records import TokenizedDemonstration, TokenizedRanking
from rlhf_jax.models.heads import scalar_head
from rlhf_jax.objectives import PolicyBatch, actor_critic, policy_hidden, reward_model, separate_critic, sft
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


def on_the_left(batch):
    """The same rows, each moved to the end of a longer row."""

    def shift(x, segments):
        if x.shape != segments.shape:
            return x
        moved = np.zeros((*x.shape[:-1], x.shape[-1] + 2), x.dtype)
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
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1])) > 1e-2
    for batch in variants(name):
        found = loss_and_gradient(jax.tree.map(jnp.asarray, batch))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected)


def test_mean_over_completion_is_the_mean_of_the_heads_values():
    """One pair by hand: the loss is -log σ of the difference of two plain means."""
    batch = jax.tree.map(jnp.asarray, ranking_batch(RANKINGS[:1], length=5, num_responses=2, **SEQUENCES))
    means = []
    for prompt, response in [((5, 6), (7, tiny.EOS)), ((5, 6), (tiny.EOS,))]:
        row = jnp.asarray([prompt + response])
        hidden = policy_hidden(tiny.MODEL, REWARD_PARAMS["trunk"], row, jnp.ones_like(row))
        means.append(float(np.mean(scalar_head(REWARD_PARAMS["head"], hidden)[0, 2:])))
    total, weight, metrics = reward_model(tiny.MODEL, mean_over_completion=True)(REWARD_PARAMS, batch)
    np.testing.assert_allclose(total / weight, np.log1p(np.exp(means[0] - means[1])), rtol=1e-5)
    np.testing.assert_allclose(metrics["rm/margin"][0], means[1] - means[0], rtol=1e-4)
