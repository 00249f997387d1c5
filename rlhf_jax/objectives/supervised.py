"""Act 1: imitate demonstrations."""

import jax.numpy as jnp

from rlhf_jax.functional.logprobs import token_logprobs
from rlhf_jax.functional.masking import masked_sum, shift_right
from rlhf_jax.objectives.forward import policy_hidden
from rlhf_jax.types import CausalModel, Objective, Params, SequenceBatch


def sft(model: CausalModel) -> Objective:
    """Negative log-likelihood of the demonstrations' completion tokens, in nats per token (Ouyang et al. 2022, §3.5)."""

    def objective(params: Params, batch: SequenceBatch):
        logits = model.unembed(params, policy_hidden(model, params, batch.tokens, batch.segment_ids))
        logprobs = token_logprobs(logits, batch.tokens)
        total = masked_sum(-logprobs, batch.loss_mask)
        weight = batch.loss_mask.sum().astype(jnp.float32)
        hits = shift_right(jnp.argmax(logits, axis=-1)) == batch.tokens
        return total, weight, {"sft/nll": (total, weight), "sft/accuracy": (masked_sum(hits, batch.loss_mask), weight)}

    return objective
