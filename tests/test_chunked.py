"""Every objective and every scoring with logits in chunks: the plain form's numbers, and memory that does not know V."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import rlhf_jax as rl
from rlhf_jax.models.lora import adapter_model, init_lora, lora_model
from rlhf_jax.objectives import PolicyBatch
from rlhf_jax.runtime.sharding import make_mesh, replicate, shard_batch
from rlhf_jax.training.choices import make_pair_experience_fn
from rlhf_jax.training.evaluate import token_kl
from rlhf_jax.types import Experience, Generation, LabelledBatch, PreferenceBatch, SequenceBatch

B, T, CHUNK = 4, 9, 8  # two columns of nine, so that the last chunk is too long
CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)
NETWORKS = {
    "tied": CONFIG,
    "untied, capped": dataclasses.replace(CONFIG, tie_embeddings=False, logit_softcap=2.0),
    "bfloat16": dataclasses.replace(CONFIG, dtype="bfloat16"),
}
RNG = np.random.default_rng(0)
TOKENS, SEGMENTS = jnp.asarray(RNG.integers(2, tiny.VOCAB, (B, T))), jnp.ones((B, T), jnp.int32)
MASK = jnp.asarray((np.arange(T) >= np.array([[4], [5], [6], [4]])) & (np.arange(T) < np.array([[9], [7], [8], [9]])))
OLD, VALUES, ADVANTAGES, RETURNS, REF = jnp.asarray(RNG.normal(size=(5, B, T)).astype(np.float32))
OLD, REF = OLD - 3, REF - 3
TEXTS = SequenceBatch(TOKENS, SEGMENTS, MASK)
EXPERIENCE = Experience(TOKENS, SEGMENTS, MASK, OLD, ADVANTAGES, VALUES, RETURNS, REF)
WITH_TEXTS = PolicyBatch(EXPERIENCE, TEXTS, jnp.asarray([0.5, 1.0, 0.0, 2.0]))
PAIRS = PreferenceBatch(
    *(x.reshape(2, 2, T) for x in (TOKENS, SEGMENTS, MASK)), jnp.ones(2, bool), REF.reshape(2, 2, T)
)
LABELLED = LabelledBatch(*(PAIRS.tokens, PAIRS.segment_ids, PAIRS.completion_mask), jnp.asarray([True, False]))
LABELLED = LABELLED.replace(ref_logprobs=PAIRS.ref_logprobs)


def params_of(config, seed=0):
    return jax.jit(rl.transformer.init, static_argnums=1)(jax.random.key(seed), config)


def ppo(model):
    return rl.actor_critic(model, rl.shared_critic, temperature=0.7, entropy_coef=0.1)


def grpo(model):
    return rl.policy_gradient(model, rl.clipped_policy_loss, temperature=0.7, kl_coef=0.1)


def dpo(model):
    return rl.preference(model, rl.dpo_loss, beta=0.1, nll_coef=0.5)


def of_policy(params):
    return {"policy": params, "critic": {"head": rl.init_value_head(CONFIG.model_dim)}}


CASES = {
    "sft": ("bfloat16", rl.sft, TEXTS, lambda params: params),
    "PPO-ptx": ("untied, capped", ppo, WITH_TEXTS, of_policy),
    "GRPO-ptx": ("tied", grpo, WITH_TEXTS, of_policy),
    "DPO": ("untied, capped", dpo, PAIRS, lambda params: params),
    "KTO": ("tied", partial(rl.labelled_preference, loss_fn=rl.kto_loss), LABELLED, lambda params: params),
}


def assert_same(plain, chunked, tolerance=1e-5):
    """To a part of the largest number of each array."""

    def check(a, b):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * (np.abs(a).max() + 1e-3))

    jax.tree.map(check, plain, chunked)


def loss_metrics_and_gradient(objective, params, batch):
    def loss(params):
        total, weight, metrics = objective(params, batch)
        return total / weight, metrics

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("name", CASES)
def test_every_objective_is_the_plain_one(name):
    network, make, batch, arrange = CASES[name]
    model = rl.causal_model(NETWORKS[network])
    params = arrange(params_of(NETWORKS[network]))

    @jax.jit
    def both(params, batch):
        models = (model, model._replace(logits_chunk=CHUNK))
        return [loss_metrics_and_gradient(make(model), params, batch) for model in models]

    # A chunk's gradient of a matrix is rounded to bfloat16, as the whole one is.
    assert_same(*both(params, batch), tolerance=2e-2 if network == "bfloat16" else 2e-5)


def test_an_adapter_is_trained_through_chunks():
    """Its base is closed over and frozen: nothing is summed for the output matrix."""
    base, adapter = params_of(CONFIG), init_lora(jax.random.key(1), CONFIG, rank=2, targets=("query", "up"))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)

    def gradient(chunk, base, adapter):
        whole = rl.causal_model(dataclasses.replace(CONFIG, logits_chunk=chunk))
        model = adapter_model(whole, base, scale=0.5)
        assert model.logits_chunk == lora_model(whole, scale=0.5).logits_chunk == chunk
        return loss_metrics_and_gradient(rl.sft(model), adapter, TEXTS)

    assert_same(*jax.jit(lambda *args: [gradient(chunk, *args) for chunk in (None, CHUNK)])(base, adapter))
    products = str(jax.make_jaxpr(partial(gradient, CHUNK))(base, adapter))
    assert f"f32[{tiny.VOCAB},{CONFIG.model_dim}] = dot_general" not in products


def inside(batch):
    """Elsewhere the log-probs of the reference mean nothing."""
    mask = batch.mask if isinstance(batch, Experience) else batch.completion_mask
    return jax.tree.map(lambda x: jnp.where(mask, x, 0) if x.shape == mask.shape else x, batch)


def test_every_scoring_is_the_plain_one():
    """Experience with a critic and without, for pairs; and the exact KL."""
    params, reference = params_of(NETWORKS["untied, capped"]), params_of(NETWORKS["untied, capped"], 7)
    generation = Generation(TOKENS, SEGMENTS, MASK, jnp.where(MASK, OLD, 0.0), jnp.ones(B, bool))
    scores = jnp.asarray([0.3, -1.0, 2.0, 0.5])

    def scoring(model):
        advantages = rl.per_completion(rl.leave_one_out, group_size=2)
        without = rl.make_policy_experience_fn(model, advantages, kl_in_reward=True, temperature=0.7)
        makers = (
            rl.make_experience_fn(model, rl.shared_critic),
            without,
            make_pair_experience_fn(model, temperature=0.7),
        )
        found = [make(of_policy(params), reference, generation, scores, jnp.float32(0.1)) for make in makers]
        kl = token_kl((model, params), (model, reference), TOKENS, SEGMENTS, temperature=0.7)
        return [(inside(batch), metrics) for batch, metrics in found], kl

    model = rl.causal_model(NETWORKS["untied, capped"])
    assert_same(*jax.jit(lambda: [scoring(m) for m in (model, model._replace(logits_chunk=CHUNK))])())


def test_rows_stay_on_their_devices():
    """Two devices with half of the rows each: the numbers of one, and no array of all rows is gathered."""
    model = rl.causal_model(dataclasses.replace(CONFIG, logits_chunk=CHUNK))
    params, mesh = params_of(CONFIG), make_mesh()
    assert mesh.size == 2
    step = jax.jit(partial(loss_metrics_and_gradient, rl.sft(model)))
    placed = (replicate(params, mesh), shard_batch(TEXTS, mesh))
    compiled = step.lower(*placed).compile()
    assert_same(step(params, TEXTS), compiled(*placed))
    assert "all-reduce" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()


def test_memory_does_not_grow_with_the_vocabulary():
    """A step's temporaries, gradients of the matrices included, at one number of logits a chunk."""
    shape = (16, 512)
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)

    def temporaries(vocab_size):
        config = rl.TransformerConfig(
            vocab_size=vocab_size, num_layers=1, model_dim=16, num_heads=1, num_kv_heads=1, head_dim=16, mlp_dim=16
        )
        model = rl.causal_model(config)._replace(logits_chunk=2**21 // vocab_size)
        params = jax.eval_shape(lambda: rl.transformer.init(jax.random.key(0), config))
        step = jax.jit(partial(loss_metrics_and_gradient, rl.sft(model)))
        return step.lower(params, SequenceBatch(ids, ids, mask)).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(8_192), temporaries(131_072)
    assert large < 1.2 * small
    assert large < 0.05 * 4 * 16 * 512 * 131_072  # of one [B, T, V]
