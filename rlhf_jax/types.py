"""The nouns of the library: train states, batches, and the callable types between the floors.

Every class is a pytree of arrays and nothing else, so it can be jitted, donated, sharded, vmapped,
checkpointed and compared without special cases.

Legend of shapes: B rows, T tokens of a row, P tokens of a prompt, K responses to one prompt, V vocabulary,
D width of the model. Masks are bool and True means "keep". Every `[B, T]` array is aligned to its tokens: entry
`t` belongs to `tokens[:, t]`, so `logprobs[b, t] = log p(tokens[b, t] | tokens[b, :t])` and `values[b, t]` is
the value read before token `t` is emitted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from flax import struct
from jaxtyping import Array, Bool, Float, Int

Params: TypeAlias = Any
"""A pytree of float arrays."""

Cache: TypeAlias = Any
"""A pytree of arrays that a model keeps between two calls while it decodes."""

PickFn: TypeAlias = Callable[[Array], Array]
"""`[B, T, ...] -> [B, R, ...]`: some columns of an array that is aligned to its tokens; `models.picking` has them."""

Metrics: TypeAlias = dict[str, Float[Array, ""]]
"""Name to scalar."""

WeightedMetrics: TypeAlias = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""Name to (total, weight): summed over micro-batches first, divided once at the end."""


class CausalModel(NamedTuple):
    """What the floors above know of a decoder: three pure functions, and how to call one. Bring any module that offers them.

    `hidden(params, tokens [B, T], positions [B, T], segment_ids [B, T], cache | None) -> (hidden [B, T, D], cache)`
        Position `t` sees tokens `<= t` of its own segment. Without a cache it returns None for it; with one it
        appends the new tokens to what the cache holds and attends to all of it.
    `unembed(params, hidden [..., D]) -> logits [..., V]`
    `init_cache(batch_size, max_length) -> cache`

    `logits_chunk`: tokens, over all rows, whose logits a loss or a scoring makes at a time; None = all at once. With it
    nothing as large as `[B, T, V]` is ever in memory, forward or backward, and the results are the same to rounding (see
    `chunked_token_laws`). Of any model: `model._replace(logits_chunk=1024)`.

    Two more make sampling faster; a model without them (None) is served by repeating its prompts.

    `fork_cache(cache, num_branches, max_length) -> cache`
        Rows `b * num_branches` to `(b + 1) * num_branches - 1` go on from row b, whose past is held once; each has room for
        `max_length` tokens more.
    `refill_cache(cache, rows [R], fresh) -> cache`
        Row `rows[r]` forgets what it holds and goes on from row r of `fresh`, a full cache; a row beyond the last is left
        out. From then on one token at a time is appended, and the columns are a ring: the oldest are overwritten.

    One more leaves out work whose result nobody reads; without it all is computed, then picked.

    `hidden_at(params, tokens, positions, segment_ids, cache | None, pick) -> (hidden [B, R, D], cache)`
        `hidden` at the columns that `pick` picks.
    """

    hidden: Callable[..., tuple[Float[Array, "B T D"], Cache]]
    unembed: Callable[[Params, Float[Array, "... D"]], Float[Array, "... V"]]
    init_cache: Callable[[int, int], Cache]
    logits_chunk: int | None = None
    fork_cache: Callable[[Cache, int, int], Cache] | None = None
    refill_cache: Callable[[Cache, Int[Array, "R"], Cache], Cache] | None = None
    hidden_at: Callable[..., tuple[Float[Array, "B R D"], Cache]] | None = None


Objective: TypeAlias = Callable[[Params, Any], tuple[Float[Array, ""], Float[Array, ""], WeightedMetrics]]
"""`objective(params, batch) -> (total, weight, metrics)`; the loss is `total / weight`, divided once."""


@struct.dataclass
class TrainState:
    """Parameters under training. The optimiser itself is closed over by the step function."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


@struct.dataclass
class PPOState:
    """State of an RL run; `params` is `{"policy": ..., "critic": ...}`."""

    step: Int[Array, ""]
    """Finished iterations (rollout + update)."""
    params: Params
    opt_state: Any
    kl_coef: Float[Array, ""]
    """Coefficient of the KL leash, in reward units per nat."""


@struct.dataclass
class Frozen:
    """What an RL iteration reads and never writes."""

    ref_params: Params
    reward_params: Params = None
    """None where the score is no model's."""
    reward_mean: Float[Array, ""] | float = 0.0
    """Mean and standard deviation of the raw scores on samples of the reference policy."""
    reward_std: Float[Array, ""] | float = 1.0


@struct.dataclass
class SequenceBatch:
    """Rows of tokens to imitate (demonstrations)."""

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    """0 = padding; rows may pack several sequences as 1, 2, 3, ..."""
    loss_mask: Bool[Array, "B T"]
    """True where the token counts: the completion and its end of sequence."""


@struct.dataclass
class RankingBatch:
    """K responses to each of B prompts, ranked. Pairs are K = 2 with ranks (0, 1)."""

    tokens: Int[Array, "B K T"]
    segment_ids: Int[Array, "B K T"]
    completion_mask: Bool[Array, "B K T"]
    """True on the response's tokens."""
    ranks: Int[Array, "B K"]
    """0 = best; equal ranks are ties."""
    mask: Bool[Array, "B K"]
    """False for places that hold no response (prompts may have fewer than K)."""


@struct.dataclass
class PromptBatch:
    """Prompts to answer, left-padded so that all end in the same column."""

    tokens: Int[Array, "B P"]
    mask: Bool[Array, "B P"]


@struct.dataclass
class Generation:
    """Prompts with the completions that were sampled for them."""

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    """1 for prompt and completion, 0 for padding on either side."""
    completion_mask: Bool[Array, "B T"]
    """True on sampled tokens, the end of sequence included."""
    logprobs: Float[Array, "B T"]
    """Log-probs of the sampled tokens at the sampling temperature, before any top-k or top-p; 0 elsewhere."""
    ended: Bool[Array, "B"]
    """True where the row emitted the end of sequence."""


@struct.dataclass
class Experience:
    """One rollout with everything an RL update needs, computed once."""

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    """True on the completion tokens that are learned from."""
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    old_values: Float[Array, "B T"] | None = None
    """With `returns`: for methods with a critic."""
    returns: Float[Array, "B T"] | None = None
    ref_logprobs: Float[Array, "B T"] | None = None
    """For a KL term in the loss."""


@struct.dataclass
class PreferenceBatch:
    """B pairs; `[:, 0]` is the chosen completion, `[:, 1]` the rejected one."""

    tokens: Int[Array, "B 2 T"]
    segment_ids: Int[Array, "B 2 T"]
    completion_mask: Bool[Array, "B 2 T"]
    """True on the completion's tokens."""
    mask: Bool[Array, "B"]
    """False for a pair that prefers neither (a tie)."""
    ref_logprobs: Float[Array, "B 2 T"] | None = None
    """Under the reference; None for methods without one."""


@struct.dataclass
class LabelledBatch:
    """B completions that are good or bad; `[:, 1]` is the same prompt with the completion of another one (KTO)."""

    tokens: Int[Array, "B 2 T"]
    segment_ids: Int[Array, "B 2 T"]
    completion_mask: Bool[Array, "B 2 T"]
    """True on the completion's tokens."""
    desirable: Bool[Array, "B"]
    """About `[:, 0]`."""
    ref_logprobs: Float[Array, "B 2 T"] | None = None
    """Under the reference."""
