"""A fixed piece of work, the same for every library: two Llama-type networks in float32, six tasks, no padding.

Every sequence has exactly the stated length, no end of sequence ends a completion, prompts and text are random words. The
sizes are those by which other libraries have been measured; `tasks.py` does the work, `compare.py` lets a peer do it too.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import rlhf_jax as rl
from rlhf_jax.models import huggingface
from rlhf_jax.models.architecture import LayerKind
from rlhf_jax.models.attention import blocked_attention
from rlhf_jax.models.products import small_turned
from rlhf_jax.models.rope import Rope
from rlhf_jax.types import Params

_COMMON = {
    "tie_embeddings": False,
    "norm_eps": 1e-5,
    "kinds": (LayerKind(rope=Rope(base=1e6)),),
    "attention_fn": blocked_attention,
    "product_fn": small_turned,
    "last_layer_where_read": True,
}
MODELS = {
    "tiny": rl.TransformerConfig(
        vocab_size=1024, num_layers=4, model_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=512, unroll=4,
        **_COMMON,
    ),
    "small": rl.TransformerConfig(
        vocab_size=8192, num_layers=8, model_dim=512, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=1536, unroll=8,
        **_COMMON,
    ),
}  # fmt: skip
"""1.2 and 36 million parameters, with embedding and output matrix."""

FIRST_WORD = 4
"""Ids below are padding, begin, end and unknown."""
LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and tokens of the six tasks; a step of each is what a rate counts."""

    rows: int = 8
    """Of SFT; pairs of the reward model and of DPO."""
    length: int = 256
    """Of a row of SFT; of prompt and response of a pair, half each."""
    prompts: int = 32
    """Rows of generation, episodes of PPO."""
    prompt: int = 64
    new: int = 64
    epochs: int = 2
    minibatches: int = 4
    """Of PPO: eight updates an iteration."""
    groups: int = 8
    group_size: int = 4
    """Of GRPO, with one update an iteration."""


STEPS = {
    "tiny": {"sft": 40, "rm": 20, "gen": 10, "ppo": 6, "grpo": 10, "dpo": 20},
    "small": {"sft": 10, "rm": 6, "gen": 5, "ppo": 2, "grpo": 4, "dpo": 6},
}
"""Measured ones; two come before them, one in reinforcement learning."""


def words(seed: int, vocab_size: int, *shape: int) -> np.ndarray:
    """Random ids of words, int32."""
    return np.random.default_rng([1234, seed]).integers(FIRST_WORD, vocab_size, shape, dtype=np.int32)


class Weights(NamedTuple):
    """Where a task's networks come from; every call gives arrays of its own."""

    policy: Callable[[], Params]
    scorer: Callable[[], Params]
    """`{"trunk": ..., "head": ...}`, of a reward model or a critic."""


def random_weights(network: rl.TransformerConfig) -> Weights:
    """Made anew at every call."""

    def scorer() -> Params:
        trunk = rl.transformer.init(jax.random.key(1), network)
        trunk.pop("unembedding", None)
        return {"trunk": trunk, "head": rl.init_reward_head(jax.random.key(2), network.model_dim)}

    return Weights(lambda: rl.transformer.init(jax.random.key(0), network), scorer)


def stored_weights(network: rl.TransformerConfig, folder: Path) -> Weights:
    """Read at every call from Hugging Face folders, as other libraries read theirs; written where they are missing."""
    policy, scorer = folder / "policy", folder / "scorer"
    if not scorer.exists():
        random, config = random_weights(network), huggingface.llama_config(network)
        if not policy.exists():
            huggingface.save(policy, random.policy(), config)
        huggingface.save_reward_model(scorer, random.scorer(), config, pad_token_id=0)
    return Weights(lambda: huggingface.load(policy).params, lambda: huggingface.load_reward_model(scorer).params)
