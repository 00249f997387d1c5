"""The smallest model that has every part (grouped queries, two layers), shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import init_reward_head, init_value_head
from rlhf_jax.types import Frozen, PromptBatch

VOCAB, EOS, PAD = 17, 1, 0

CONFIG = TransformerConfig(
    vocab_size=VOCAB, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24
)
MODEL = transformer.causal_model(CONFIG)


@jax.jit  # compiled as one: an operation of its own costs some 40 ms
def init_params(seed: int = 0):
    return transformer.init(jax.random.key(seed), CONFIG)


@jax.jit
def init_critic(seed: int = 1):
    return {"trunk": init_params(seed), "head": init_value_head(CONFIG.model_dim)}


@jax.jit
def init_frozen(seed: int = 0) -> Frozen:
    return Frozen(
        ref_params=init_params(seed),
        reward_params={"trunk": init_params(2), "head": init_reward_head(jax.random.key(3), CONFIG.model_dim)},
        reward_mean=jnp.zeros(()),
        reward_std=jnp.ones(()),
    )


def prompts(sizes: tuple[int, ...] = (3, 5, 1, 4), width: int = 5, seed: int = 0) -> PromptBatch:
    """Left-padded random prompts of the given sizes; a size's tokens do not depend on `width`."""
    tokens = np.full((len(sizes), width), PAD, np.int32)
    mask = np.zeros((len(sizes), width), bool)
    for row, size in enumerate(sizes):
        tokens[row, width - size :] = np.random.default_rng([seed, row]).integers(2, VOCAB, size)
        mask[row, width - size :] = True
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask))
