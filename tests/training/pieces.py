"""The four functions of a PPO iteration on the smallest model, and where it starts."""

import jax
import optax
import tiny

from rlhf_jax.generation.generate import generate
from rlhf_jax.objectives import actor_critic, separate_critic
from rlhf_jax.training.ppo import init_ppo_state, make_ppo_update
from rlhf_jax.training.rollout import make_experience_fn, make_score_fn
from rlhf_jax.training.train_step import make_train_step

NEW = 6
SIZES = (3, 5, 1, 4, 2, 5, 3, 4)


def parts(model=tiny.MODEL, critic=None, optimizer=None, **update_options):
    """The four functions of an iteration."""
    critic = separate_critic(model) if critic is None else critic
    train_step = make_train_step(actor_critic(model, critic), optimizer or optax.adam(1e-2))
    options = {"num_epochs": 2, "num_minibatches": 2, "kl_target": 1.0, "kl_horizon": 100.0, **update_options}

    def sample(params, prompts, key):
        return generate(model, params, prompts, key, max_new_tokens=NEW, eos_id=tiny.EOS, pad_id=tiny.PAD)

    return sample, make_score_fn(tiny.MODEL), make_experience_fn(model, critic), make_ppo_update(train_step, **options)


@jax.jit
def fresh_state(seed=0):
    return init_ppo_state(tiny.init_params(seed), tiny.init_critic(), optax.adam(1e-2), kl_coef=0.1)
