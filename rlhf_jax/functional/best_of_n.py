"""Best-of-n: draw n completions, keep the one that scores best. How far that goes, and what it is worth.

The curve over n needs no second sampling: one pool of N completions a prompt holds C(N, n) draws of n, and a sorted pool
gives their mean in closed form (`best_of_n_weights`). Where outcomes can be enumerated, `best_of_n_logprobs` is the law.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real, ScalarLike

from rlhf_jax.functional.checks import check_between


def best_of_n_kl(num_samples: ScalarLike | Real[Array, "*shape"]) -> Float[Array, "*shape"]:
    """KL of best-of-n from the policy it draws from, in closed form: `log n - (n - 1) / n` (Stiennon et al. 2020).

    An **upper bound** (Beirami et al. 2024, theorem 3.1), and exact only where no two samples ever tie, as with a continuous
    score. Where outcomes repeat it is too large: of two equally likely outcomes KL stays below log 2 for every n. One of
    many rare completions, each far rarer than 1/n, comes close. n = 1 gives 0.

    Args:
      num_samples: n >= 1, one number or many.

    Returns:
      Nats per completion, float32, of the shape of `num_samples`.

    Raises:
      ValueError: `num_samples` is a Python number below 1.
    """
    if jnp.ndim(num_samples) == 0:
        check_between(1.0, math.inf, num_samples=num_samples)
    n = jnp.asarray(num_samples, jnp.float32)
    return jnp.log(n) - (n - 1.0) / n


def best_of_n_logprobs(
    logprobs: Float[Array, "B V"], scores: Float[Array, "B V"], *, num_samples: ScalarLike
) -> Float[Array, "B V"]:
    """The law of best-of-n over all V outcomes of a prompt (Beirami et al. 2024, here with ties).

        π_n(y) = π(y) · (F^n - G^n) / (F - G),    F = P(score <= s(y)),  G = P(score < s(y))

    Outcomes that tie share what the best of n falls on them in proportion to π, as they do when the first of equal
    samples, or a random one, is kept. n = 1 is the policy itself. `exact_kl` of the result is best-of-n's true KL.

    Args:
      logprobs: `[B, V]` of all outcomes; their probabilities sum to 1 in every row.
      scores: `[B, V]` by which the best is chosen.
      num_samples: n >= 1; needs not be whole.

    Returns:
      float32 `[B, V]`, in the order of `logprobs`.

    Raises:
      ValueError: `num_samples` is a Python number below 1.
    """
    chex.assert_equal_shape([logprobs, scores])
    chex.assert_rank(logprobs, 2)
    check_between(1.0, math.inf, num_samples=num_samples)

    def of_row(logprobs: Array, scores: Array) -> Array:
        order = jnp.argsort(scores)
        ordered, probs = scores[order], jnp.exp(logprobs[order])
        first, last = _tie_ends(ordered, scores)
        cumulative = jnp.cumsum(probs)
        at_most = cumulative[last] / cumulative[-1]
        at_most = jnp.where(at_most > 0, at_most, 1.0)  # probabilities that underflow stay what they are
        tied = jax.ops.segment_sum(probs, _tie_ends(ordered, ordered)[0], num_segments=probs.size)[first]
        # With q = (F - G) / F the ratio is F^(n-1) (1 - (1-q)^n) / q: n F^(n-1) at q = 0, F^(n-1) at q = 1.
        q = jnp.clip(tied / cumulative[-1] / at_most, 0.0, 1.0)
        inside = (q > 0) & (q < 1)
        hit = jnp.log(-jnp.expm1(num_samples * jnp.log1p(-jnp.where(inside, q, 0.5))))
        gain = jnp.where(inside, hit, 0.0) - jnp.log(jnp.where(q > 0, q, 1.0))
        return logprobs + (num_samples - 1.0) * jnp.log(at_most) + jnp.where(q > 0, gain, jnp.log(num_samples))

    return jax.vmap(of_row)(logprobs.astype(jnp.float32), scores.astype(jnp.float32))


def best_of_n_weights(scores: Float[Array, "B N"], *, num_samples: int) -> Float[Array, "B N"]:
    """How often each of N pooled samples is the best of n drawn from the pool without replacement (Nakano et al. 2021).

        w_(i) = C(i - 1, n - 1) / C(N, n)       i = 1, ..., N: the place in ascending order of scores

    A weighted sum of anything measured on the pool is the mean over all C(N, n) draws, so an unbiased estimate of what
    best-of-n gives. Samples of equal score share their places' weights evenly: over draws in random order that is what
    keeping the first of the best gives. n = 1 weighs all alike, n = N gives the best (or the bests) everything.

    The weights are running products, `w_(N) = n / N` and `w_(i) = w_(i+1) (i - n + 1) / i`, in double precision while the
    program is built: no factorial overflows, and a pool of thousands is exact to float32.

    Args:
      scores: `[B, N]` one pool a row; its samples are independent draws from one policy to one prompt. A NaN sorts last.
      num_samples: n, a Python int in 1..N.

    Returns:
      float32 `[B, N]` in the order of `scores`; every row sums to 1. No gradient flows through it.

    Raises:
      ValueError: `num_samples` is not in 1..N.
    """
    chex.assert_rank(scores, 2)
    pool = scores.shape[1]
    check_between(1.0, float(pool), num_samples=num_samples)
    places = [num_samples / pool]
    for i in range(pool - 1, 0, -1):
        places.append(places[-1] * max(i - num_samples + 1, 0) / i)
    by_place = jnp.flip(jnp.asarray(places, jnp.float32))

    def of_row(scores: Array) -> Array:
        ordered = jnp.sort(scores)
        starts, ends = _tie_ends(ordered, ordered)
        shared = jax.ops.segment_sum(by_place / (ends - starts + 1), starts, num_segments=pool)
        return shared[_tie_ends(ordered, scores)[0]]

    return jax.vmap(of_row)(jax.lax.stop_gradient(scores.astype(jnp.float32)))


def best_of_n_mean(scores: Float[Array, "B N"], values: Float[Array, "B N"], *, num_samples: int) -> Float[Array, "B"]:
    """Unbiased estimate of a value's mean under best-of-n by score, `Σ_i w_i value_i`; see `best_of_n_weights`.

    `values = scores` gives the curve that is optimised, gold rewards, lengths or log-ratios as `values` what it costs
    (Gao et al. 2022). Its standard error is that over prompts, which are independent; a pool's own draws are not, and n
    close to N rests on few samples.

    Args:
      scores: `[B, N]` by which the best is chosen.
      values: `[B, N]` measured on the same samples.
      num_samples: n, a Python int in 1..N, else ValueError.

    Returns:
      float32 `[B]`, one estimate a prompt.
    """
    chex.assert_equal_shape([scores, values])
    return (best_of_n_weights(scores, num_samples=num_samples) * values.astype(jnp.float32)).sum(axis=1)


def _tie_ends(ordered: Array, scores: Array) -> tuple[Array, Array]:
    """First and last place in `ordered [N]` of what ties with each of `scores`."""
    first, past = (jnp.searchsorted(ordered, scores, side=side, method="sort") for side in ("left", "right"))
    return first, past - 1
