"""Reinforcement learning from human feedback as pure JAX functions.

The names below are those that a program composes; each lives in the module that it is imported from here. Readers,
tokenizers and batches are in `rlhf_jax.data`, checkpoints, logs and run folders in `rlhf_jax.runtime`.
"""

from rlhf_jax.functional.advantages import gae, group_relative, leave_one_out
from rlhf_jax.functional.kl import adaptive_kl_coef, k1, k2, k3
from rlhf_jax.functional.logprobs import entropy, mean_logprobs, sequence_logprobs, token_logprobs
from rlhf_jax.functional.masking import masked_whiten, shift_right
from rlhf_jax.functional.policy_losses import cispo_loss, clipped_policy_loss, clipped_value_loss, gspo_loss
from rlhf_jax.functional.preference_losses import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_jax.functional.reward_losses import (
    best_of_k_loss,
    bradley_terry_loss,
    pairwise_ranking_loss,
    plackett_luce_loss,
)
from rlhf_jax.functional.rewards import normalize_scores, shape_rewards, subtract_missing_eos
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import transformer
from rlhf_jax.models.heads import init_reward_head, init_value_head, sequence_scores
from rlhf_jax.models.parameters import logical_axes
from rlhf_jax.models.transformer import TransformerConfig, causal_model
from rlhf_jax.models.uncached import uncached_model
from rlhf_jax.objectives import (
    PolicyBatch,
    actor_critic,
    reward_model,
    separate_critic,
    sequence_token_logprobs,
    sft,
    shared_critic,
)
from rlhf_jax.runtime.sharding import make_mesh, named_shardings, shard_batch
from rlhf_jax.training.evaluate import evaluate, win_rate
from rlhf_jax.training.optimizers import adam_optimizer, ppo_optimizer
from rlhf_jax.training.ppo import PPOBatch, critic_from_trunk, init_ppo_state, make_ppo_iteration, make_ppo_update
from rlhf_jax.training.rollout import check_scores, make_experience_fn, make_score_fn
from rlhf_jax.training.train_step import init_train_state, make_train_step, update_epochs
from rlhf_jax.types import (
    CausalModel,
    Experience,
    Frozen,
    Generation,
    PPOState,
    PromptBatch,
    RankingBatch,
    SequenceBatch,
    TrainState,
)

__version__ = "0.1.0"

__all__ = [
    "CausalModel",
    "Experience",
    "Frozen",
    "Generation",
    "PPOBatch",
    "PPOState",
    "PolicyBatch",
    "PromptBatch",
    "RankingBatch",
    "SequenceBatch",
    "TrainState",
    "TransformerConfig",
    "actor_critic",
    "adam_optimizer",
    "adaptive_kl_coef",
    "best_of_k_loss",
    "bradley_terry_loss",
    "causal_model",
    "check_scores",
    "cispo_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cpo_loss",
    "critic_from_trunk",
    "dpo_loss",
    "entropy",
    "evaluate",
    "gae",
    "generate",
    "group_relative",
    "gspo_loss",
    "init_ppo_state",
    "init_reward_head",
    "init_train_state",
    "init_value_head",
    "ipo_loss",
    "k1",
    "k2",
    "k3",
    "kto_baseline",
    "kto_loss",
    "leave_one_out",
    "logical_axes",
    "make_experience_fn",
    "make_mesh",
    "make_ppo_iteration",
    "make_ppo_update",
    "make_score_fn",
    "make_train_step",
    "masked_whiten",
    "mean_logprobs",
    "named_shardings",
    "normalize_scores",
    "orpo_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "ppo_optimizer",
    "reward_model",
    "robust_dpo_loss",
    "separate_critic",
    "sequence_logprobs",
    "sequence_scores",
    "sequence_token_logprobs",
    "sft",
    "shape_rewards",
    "shard_batch",
    "shared_critic",
    "shift_right",
    "simpo_loss",
    "subtract_missing_eos",
    "token_logprobs",
    "transformer",
    "uncached_model",
    "update_epochs",
    "win_rate",
]
