"""Act 1: imitate demonstrations."""

import jax.numpy as jnp

from rlhf_jax.functional.masking import masked_sum
from rlhf_jax.objectives.forward import policy_hidden, policy_laws
from rlhf_jax.types import CausalModel, Objective, Params, SequenceBatch


def sft(model: CausalModel) -> Objective:
    """Negative log-likelihood of the demonstrations' completion tokens, in nats per token (Ouyang et al. 2022, §3.5)."""

    def objective(params: Params, batch: SequenceBatch):
        mask = batch.loss_mask
        hidden = policy_hidden(model, params, batch.tokens, batch.segment_ids)
        laws = policy_laws(model, params, hidden, batch.tokens, mask)
        total = masked_sum(-laws.logprobs, mask)
        weight = mask.sum().astype(jnp.float32)
        return total, weight, {"sft/nll": (total, weight), "sft/accuracy": (masked_sum(laws.hits, mask), weight)}

    return objective
