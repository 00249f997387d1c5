"""The compiled parts of an iteration whose rewards are Python's, between sampling and learning."""

import functools

import grpo_methods
import jax
import sampling
import task
from grpo_methods import GRPOConfig

import rlhf_jax as rl
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.runtime.resume import guarded
from rlhf_jax.types import Params


@functools.cache
def build(settings: GRPOConfig, lengths: task.TaskConfig, network: rl.TransformerConfig, eos_id: int, pad_id: int):
    """The optimiser, and the compiled parts: sample, reference, experience, update; equal arguments share them."""
    model = rl.causal_model(network)
    if settings.method in ("remax", "raft", "online_dpo") or settings.ptx_coef:
        what = f"method {settings.method!r}, ptx_coef {settings.ptx_coef}"
        raise ValueError(
            f"{what}: remax, raft, online_dpo and PPO-ptx are not offered here; nothing was started. Fix: grpo"
        )
    method, optimizer = (
        grpo_methods.methods(settings, lengths.response_length)[settings.method],
        grpo_methods.annealed_optimizer(settings),
    )
    sample = sampling.jitted_sampler(lengths, network, eos_id, pad_id, settings.group_size, settings.temperature)
    experience_fn, update = grpo_methods.learning(settings, method, model, optimizer)

    def reference(params: Params, generation: rl.Generation):
        rows = generation.tokens, generation.segment_ids, generation.completion_mask
        return sequence_token_logprobs(model, params, *rows, temperature=settings.temperature)

    def experience(state: rl.PPOState, ref_logprobs: jax.Array, generation: rl.Generation, scores, rows):
        batch, metrics = experience_fn(state.params, None, generation, scores, state.kl_coef, ref_logprobs)
        return rl.learn_from(batch, rows), metrics

    return optimizer, sample, jax.jit(reference), jax.jit(experience), jax.jit(guarded(update), donate_argnums=0)
