"""Numbers for the report: means with intervals, win rates, KL, held-out likelihood, reward-model accuracy."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from rlhf_jax.functional.columns import map_columns
from rlhf_jax.functional.kl import exact_kl
from rlhf_jax.functional.masking import shift_right
from rlhf_jax.objectives import policy_hidden
from rlhf_jax.types import CausalModel, Objective, Params, WeightedMetrics


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion_interval(outcomes: np.ndarray, *, z: float = 1.959964) -> Interval:
    """Mean of outcomes in [0, 1] with Wilson's score interval (Wilson 1927).

    Outcomes may be fractions (a tie counts 0.5): their variance is at most p(1 - p), so the interval is then on the
    safe side.
    """
    outcomes = np.asarray(outcomes, np.float64)
    if outcomes.size == 0 or not np.all((outcomes >= 0) & (outcomes <= 1)):
        raise ValueError(f"outcomes must be one or more numbers in [0, 1], got {outcomes.size} of them")
    n, p = outcomes.size, float(outcomes.mean())
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, min(p, centre - half), max(p, centre + half), n)


def mean_interval(values: np.ndarray) -> Interval:
    """Mean of independent values with Student's 95 % interval `mean ± t s / sqrt(n)`, t at n - 1 degrees of freedom."""
    values = np.asarray(values, np.float64)
    if values.size < 2 or not np.all(np.isfinite(values)):
        finite = np.isfinite(values).sum()
        raise ValueError(f"an interval needs two or more finite values, got {finite} of {values.size}")
    quantile = float(stdtrit(values.size - 1, 0.975))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(values.size)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half, values.size)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """How often our score beats theirs on the same prompt; equal scores count one half.

    Args:
      ours, theirs: `[N]` a judge's scores, one prompt each.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        raise ValueError(f"scores must pair up, got shapes {ours.shape} and {theirs.shape}")
    finite = np.isfinite(ours) & np.isfinite(theirs)
    if not finite.all():
        raise ValueError(f"{(~finite).sum()} of {finite.size} comparisons have a score that is not finite")
    return proportion_interval((ours > theirs) + 0.5 * (ours == theirs))


def matched_win_rate(ours: np.ndarray, theirs: np.ndarray, our_sizes: np.ndarray, their_sizes: np.ndarray) -> Interval:
    """The win rate over the comparisons whose two completions have the same length, so that length cannot win.

    Raises:
      ValueError: no comparison has.
    """
    ours, theirs, our_sizes, their_sizes = (np.asarray(x) for x in (ours, theirs, our_sizes, their_sizes))
    if not ours.shape == theirs.shape == our_sizes.shape == their_sizes.shape:
        shapes = [x.shape for x in (ours, theirs, our_sizes, their_sizes)]
        raise ValueError(f"scores and sizes must pair up, got shapes {shapes}")
    same = our_sizes == their_sizes
    if not same.any():
        raise ValueError(f"none of the {same.size} comparisons has two completions of equal length")
    return win_rate(ours[same], theirs[same])


def group_win_rate(
    ours: np.ndarray, theirs: np.ndarray, *, our_sizes: np.ndarray | None = None, their_sizes: np.ndarray | None = None
) -> Interval:
    """The win rate over every pair of our and their samples to one prompt; with sizes, of equally long pairs alone.

    Prompts are independent, pairs of one prompt are not: the unit is the prompt, whose outcome is the mean over its
    pairs. With sizes, a prompt without an equally long pair is left out.

    Args:
      ours: `[N, K]` a judge's scores of K samples to each prompt.
      theirs: `[N, L]`.
      our_sizes, their_sizes: tokens of the same samples, both or neither.

    Raises:
      ValueError: no pair is equally long, scores do not pair up, or one is not finite.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.ndim != 2 or theirs.ndim != 2 or len(ours) != len(theirs):
        raise ValueError(f"scores must be [N, K] and [N, L] of the same prompts, got {ours.shape} and {theirs.shape}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("a score is not finite; nothing was compared")
    gaps = ours[:, :, None] - theirs[:, None, :]
    compared = np.ones(gaps.shape, bool)
    if our_sizes is not None:
        compared = np.asarray(our_sizes)[:, :, None] == np.asarray(their_sizes)[:, None, :]
    if not compared.any():
        raise ValueError(f"none of the {compared.size} comparisons has two completions of equal length")
    counts = compared.sum(axis=(1, 2))
    wins = (((gaps > 0) + 0.5 * (gaps == 0)) * compared).sum(axis=(1, 2))
    return proportion_interval(wins[counts > 0] / counts[counts > 0])


def token_kl(
    policy: tuple[CausalModel, Params],
    reference: tuple[CausalModel, Params],
    tokens: jax.Array,
    segment_ids: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """KL of the next token's law at every place, `[B, T]` in nats: entry t is about token t, given what is before it.

    Summed over completions that the policy sampled, its mean is the KL of completions, with less noise than
    `k1` (see `exact_kl`). The two may be of different networks with one vocabulary. Outside the completion it
    means nothing: mask it. The smaller `logits_chunk` of the two, if there is one, holds for both.
    """
    pair = (policy, reference)
    hidden = [policy_hidden(model, params, tokens, segment_ids) for model, params in pair]

    def kl(*hidden: jax.Array) -> jax.Array:
        logits = (model.unembed(params, states) for (model, params), states in zip(pair, hidden, strict=True))
        return exact_kl(*(jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in logits))

    chunks = [model.logits_chunk for model, _ in pair if model.logits_chunk is not None]
    if not chunks:
        return shift_right(kl(*hidden))
    return shift_right(map_columns(*hidden, fn=kl, num_columns=max(1, min(chunks) // tokens.shape[0])))


def evaluate(objective: Objective) -> Callable[[Params, Iterable], dict[str, float]]:
    """Build `evaluation(params, batches) -> {metric: mean}`: an objective's metrics over a whole data set.

    Totals and weights are summed over the batches and divided once.
    """

    @jax.jit
    def step(params: Params, batch) -> WeightedMetrics:
        return objective(params, batch)[2]

    def evaluation(params: Params, batches: Iterable) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        for batch in batches:
            for name, pair in jax.device_get(step(params, batch)).items():
                sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        if not sums:
            raise ValueError("nothing to evaluate: no batch was given")
        return {name: float(total / max(weight, 1.0)) for name, (total, weight) in sums.items()}

    return evaluation
