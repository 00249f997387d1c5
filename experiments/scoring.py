"""Whole rows through a frozen model, 256 at a time, results on the host: scores and token log-probs."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import sequence_scores
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.runtime.processes import on_every_host
from rlhf_jax.types import Params


def score_rows(
    network: TransformerConfig,
    params: Params,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    mean_over: np.ndarray | None = None,
) -> np.ndarray:
    """Raw scores `[N]` of a reward model, read at the last token or averaged over a mask."""
    arrays = (tokens, segment_ids) if mean_over is None else (tokens, segment_ids, mean_over)
    return in_parts(functools.partial(_jitted_scores(network), params), *arrays)


def row_logprobs(
    network: TransformerConfig, params: Params, tokens: np.ndarray, segment_ids: np.ndarray, *, temperature: float = 1.0
) -> np.ndarray:
    """Token log-probs `[N, T]` of a policy, in nats."""
    return in_parts(functools.partial(_jitted_logprobs(network, temperature), params), tokens, segment_ids)


def row_sums(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sums `[N]` of `[N, T]` over the mask, in float64."""
    return np.where(mask, values, 0.0).sum(axis=1, dtype=np.float64)


def in_parts(function: Callable, *arrays: np.ndarray, size: int = 256) -> np.ndarray:
    """`function` of whole rows, `size` at a time; the last part is filled with its last row, which is thrown away."""
    parts, num_rows = [], len(arrays[0])
    for start in range(0, num_rows, size):
        rows = np.minimum(np.arange(start, start + size), num_rows - 1)
        parts.append(on_every_host(function(*(array[rows] for array in arrays)))[: num_rows - start])
    return np.concatenate(parts)


@functools.cache
def _jitted_scores(network: TransformerConfig):
    model = transformer.causal_model(network)
    return jax.jit(functools.partial(sequence_scores, model))


@functools.cache
def _jitted_logprobs(network: TransformerConfig, temperature: float):
    return jax.jit(
        functools.partial(sequence_token_logprobs, transformer.causal_model(network), temperature=temperature)
    )
