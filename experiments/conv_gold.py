"""A world without words whose gold reward is known exactly: sequences of a random bigram, scored by a wide convolution.

A gold reward is a convolutional network of 256 features with random weights, its scores of mean 0 and standard deviation
1 on the bigram's samples (after Gao et al. 2022, whose gold is a large reward model). Reward models are narrower networks
of the same kind, so that what they lack is data and width. Annotators perceive `gold + scale · Gumbel`, so that whole
rankings follow Plackett-Luce and pairs Bradley-Terry: `P(a before b) = σ((gold_a - gold_b) / scale)`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.masking import shift_right
from rlhf_jax.models.heads import init_reward_head, sequence_scores
from rlhf_jax.types import CausalModel, Params, RankingBatch

VOCAB_SIZE, LENGTH = 32, 12
EMBED_DIM, WINDOW, GOLD_WIDTH = 16, 3, 256


def sample_sequences(key: jax.Array, policy: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[*shape, LENGTH]` token ids of a bigram with logits `[V, V]`; the first token is uniform."""
    first_key, key = jax.random.split(key)
    first = jax.random.randint(first_key, shape, 0, VOCAB_SIZE)

    def step(token: jax.Array, step_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        following = jax.random.categorical(step_key, policy[token])
        return following, following

    _, rest = jax.lax.scan(step, first, jax.random.split(key, LENGTH - 1))
    return jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, -1)


def init_conv(key: jax.Array, *, width: int) -> Params:
    """A reward model `{"trunk", "head"}`: embeddings, one convolution over `WINDOW` tokens, a scalar head."""
    embed_key, kernel_key, bias_key, head_key = jax.random.split(key, 4)
    fan_in = WINDOW * EMBED_DIM
    trunk = {
        "embed": jax.random.normal(embed_key, (VOCAB_SIZE, EMBED_DIM)),
        "kernel": jax.random.normal(kernel_key, (fan_in, width)) * (2 / fan_in) ** 0.5,
        "bias": 0.1 * jax.random.normal(bias_key, (width,)),
    }
    return {"trunk": trunk, "head": init_reward_head(head_key, width)}


def _hidden(params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache=None):
    """`relu(kernel · the last WINDOW embeddings + bias)`, `[B, T, width]`."""
    del positions
    embedded = [jnp.where(segment_ids[..., None] > 0, params["embed"][tokens], 0.0)]
    for _ in range(WINDOW - 1):
        embedded.append(shift_right(embedded[-1]))
    return jax.nn.relu(jnp.concatenate(embedded, axis=-1) @ params["kernel"] + params["bias"][None, None]), cache


def _speechless(*arguments):
    raise TypeError(f"a convolution scores and has no words, got {len(arguments)} arguments to speak of")


CONV_MODEL = CausalModel(hidden=_hidden, unembed=_speechless, init_cache=_speechless)


def conv_scores(params: Params, tokens: jax.Array) -> jax.Array:
    """Scores `[...]` of sequences `[..., LENGTH]`: the head's mean over the tokens."""
    rows = tokens.reshape(-1, LENGTH)
    everything = jnp.ones_like(rows)
    return sequence_scores(CONV_MODEL, params, rows, everything, everything > 0).reshape(tokens.shape[:-1])


def init_gold(key: jax.Array) -> tuple[jax.Array, Params]:
    """The bigram's logits and a gold reward model whose scores have mean 0 and standard deviation 1 on its samples."""
    policy_key, gold_key, sample_key = jax.random.split(key, 3)
    policy = jax.random.normal(policy_key, (VOCAB_SIZE, VOCAB_SIZE))
    gold = init_conv(gold_key, width=GOLD_WIDTH)
    scores = conv_scores(gold, sample_sequences(sample_key, policy, (8192,)))
    head = {"weight": gold["head"]["weight"] / scores.std(), "bias": -scores.mean() / scores.std()}
    return policy, {**gold, "head": head}


def noise_scale(gaps: jax.Array, flip_rate: float) -> jax.Array:
    """The scale at which annotators contradict the gold on `flip_rate` of pairs with these gold gaps, on average."""

    def halve(_, bounds):
        left, right = bounds
        middle = (left + right) / 2
        too_noisy = jax.nn.sigmoid(-jnp.abs(gaps) / middle).mean() > flip_rate
        return jnp.where(too_noisy, left, middle), jnp.where(too_noisy, middle, right)

    return jax.lax.fori_loop(0, 40, halve, (jnp.full((), 1e-6), jnp.full((), 100.0)))[1]


def rankings(key: jax.Array, tokens: jax.Array, gold_scores: jax.Array, scale: jax.Array) -> RankingBatch:
    """Groups `[N, K, LENGTH]` ranked by one perceived value a sequence; scale 0 is the gold order."""
    perceived = gold_scores + scale * jax.random.gumbel(key, gold_scores.shape)
    everything = jnp.ones_like(tokens)
    return RankingBatch(
        tokens=tokens,
        segment_ids=everything,
        completion_mask=everything > 0,
        ranks=jnp.argsort(jnp.argsort(-perceived, axis=-1), axis=-1),
        mask=jnp.ones(gold_scores.shape, bool),
    )
