"""bfloat16 compute on float32 master weights: what stays float32, what is lost without it, and how far the results move.

A rounding to bfloat16 moves a number by at most U = 2^-9 of itself, so errors here are counted in U.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.architecture import LayerKind
from rlhf_jax.models.attention import plain_attention
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.objectives import PolicyBatch, actor_critic, reward_model, separate_critic, sequence_token_logprobs, sft
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Experience, RankingBatch, SequenceBatch

U = 2.0**-9
CONFIG = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
MODEL = transformer.causal_model(CONFIG)
BIASED = {"layer_norm": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated": False}
WINDOWS = {"kinds": (LayerKind(), LayerKind(window=2)), "layer_kinds": (0, 1), "norm_offset": 1.0, "qk_norm": True}
NETWORKS = {
    "Llama": CONFIG,
    "GPT-2": dataclasses.replace(CONFIG, **BIASED, num_positions=8, kinds=(LayerKind(rope=None),)),
    "Gemma": dataclasses.replace(CONFIG, **WINDOWS, post_norm=True, attention_softcap=5.0, logit_softcap=5.0),
    "plain": dataclasses.replace(CONFIG, attention_fn=plain_attention),
    "experts": dataclasses.replace(CONFIG, num_experts=3),
}
TOKENS = jnp.asarray([[0, 3, 7, 2, 9, 4], [5, 6, 3, 8, 2, 1]])
SEGMENTS = jnp.asarray([[0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]])
LOSS_MASK = jnp.asarray([[False, False, False, True, True, True], [False, True, True, False, True, True]])
TEXTS = SequenceBatch(TOKENS, SEGMENTS, LOSS_MASK)

NEEDS_FLOAT32 = {"exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "div", "reduce_sum", "reduce_max", "reduce_min"}
NEEDS_FLOAT32 |= {"cumsum", "cumlogsumexp", "argmax", "sort", "top_k", "sin", "cos", "select_and_scatter_add"}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = part.jaxpr if isinstance(part, jax.extend.core.ClosedJaxpr) else part
                if isinstance(inner, jax.extend.core.Jaxpr):
                    yield from equations(inner)


def half_operands(function, *args) -> set[str]:
    """Operations that read bfloat16."""
    found = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return {e.primitive.name for e in found if any(v.aval.dtype == jnp.bfloat16 for v in e.invars)}


def logits_of(params, config, tokens=TOKENS, segments=SEGMENTS):
    states, _ = transformer.hidden(params, config, tokens, positions_from_segments(segments), segments)
    return transformer.unembed(params, config, states)


def losses(config):
    """Every kind of objective, with params and batch."""
    model, params = transformer.causal_model(config), transformer.init(jax.random.key(0), config)
    scorer = {"trunk": params, "head": init_reward_head(jax.random.key(1), config.model_dim)}
    zeros = jnp.zeros(TOKENS.shape)
    experience = Experience(TOKENS, SEGMENTS, LOSS_MASK, zeros - 2.0, zeros, zeros + 1.0, zeros)
    pair = [x[None] for x in (TOKENS, SEGMENTS, LOSS_MASK)]
    ranking = RankingBatch(*pair, jnp.asarray([[0, 1]]), jnp.ones((1, 2), bool))
    return {
        "sft": (sft(model), params, TEXTS),
        "reward": (reward_model(model), scorer, ranking),
        "ppo": (
            actor_critic(model, separate_critic(model), entropy_coef=0.1),
            {"policy": params, "critic": scorer},
            PolicyBatch(experience),
        ),
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_only_products_and_activations_are_bfloat16(name):
    """Forward and backward of every loss: no reduction, exponential, root or quotient reads bfloat16, and the rest does."""
    for objective, params, batch in losses(NETWORKS[name]).values():

        def loss(params, objective=objective, batch=batch):
            return objective(params, batch)[0]

        found = half_operands(jax.grad(loss), params)
        assert "dot_general" in found
        assert not found & NEEDS_FLOAT32
        assert not half_operands(loss, params) & NEEDS_FLOAT32


def test_the_check_sees_a_bfloat16_softmax():
    def careless(query, key, value, sight, *, scale, softcap):
        logits = jnp.where(sight.mask, scale * jnp.einsum("btnc,bsnc->bnts", query, key), -jnp.inf)
        return jnp.einsum("bnts,bsnc->btnc", jax.nn.softmax(logits, axis=-1), value)

    config = dataclasses.replace(CONFIG, attention_fn=careless, num_kv_heads=4)
    params = transformer.init(jax.random.key(0), config)
    assert {"exp", "reduce_max"} <= half_operands(lambda p: logits_of(p, config), params) & NEEDS_FLOAT32


def test_matrix_products_are_bfloat16():
    """All of the forward's, but the router's; logits come out in float32."""
    for name, expected in (("Llama", set()), ("experts", {(16, 3)})):
        config = NETWORKS[name]
        params = transformer.init(jax.random.key(0), config)
        found = [e for e in equations(jax.make_jaxpr(lambda p, c=config: logits_of(p, c))(params).jaxpr)]
        products = [e for e in found if e.primitive.name in ("dot_general", "ragged_dot_general")]
        dtypes = [{str(v.aval.dtype) for v in e.invars[:2]} for e in products]
        assert all(len(pair) == 1 for pair in dtypes)
        assert {
            e.invars[1].aval.shape for e, pair in zip(products, dtypes, strict=True) if "float32" in pair
        } == expected
        assert len(products) > 5
        assert products[-1].outvars[0].aval.dtype == jnp.float32


def test_updates_below_an_ulp_are_not_lost():
    """Steps of 3e-4 by the gradient's sign from a scale of 1; the next bfloat16 numbers are 1 - 2^-8 and 1 + 2^-7."""
    optimizer = optax.chain(optax.scale_by_sign(), optax.scale(-3e-4))
    step = make_train_step(sft(MODEL), optimizer)
    run = jax.jit(lambda state: jax.lax.scan(lambda state, _: (step(state, TEXTS)[0], None), state, length=40)[0])

    def moved(dtype):
        params = jax.tree.map(lambda x: x.astype(dtype), tiny.init_params())
        after = run(init_train_state(params, optimizer)).params
        assert after["final_norm"].dtype == dtype
        return np.abs(np.asarray(after["final_norm"], np.float32) - 1)

    kept, lost = moved(jnp.float32), moved(jnp.bfloat16)
    np.testing.assert_array_equal(lost, 0)
    assert np.median(kept) > 2.0**-8  # 40 · 3e-4 = 0.012, where the gradient keeps its sign


def roundings(config) -> int:
    """Most roundings to bfloat16 that one number goes through, from token to logits.

    A layer: two norms, three projections, two rotations, weights, their sum, out, three MLP products, activation and
    gate, two sums with the residual stream, and seven rounded matrices. Around: embedding, matrix, state.
    """
    return 24 * config.num_layers + 3


def test_close_to_float32():
    """Roundings add like a random walk: sqrt(n) U of the logits' root mean square. All families: `test_families`."""
    for name in ("Llama", "GPT-2", "Gemma"):
        config = NETWORKS[name]
        params = transformer.init(jax.random.key(0), config)
        exact = np.asarray(logits_of(params, dataclasses.replace(config, dtype="float32")))
        error = np.asarray(logits_of(params, config)) - exact
        assert 0.1 * U < np.sqrt((error**2).mean() / (exact**2).mean()) < U * roundings(config) ** 0.5, name


def test_the_sampler_and_the_training_forward_agree():
    """Before the first update the ratio is 1 in bfloat16, too: both forwards round at the same places."""
    prompts, limit = tiny.prompts(), 6
    sample = jax.jit(
        lambda params, key: generate(MODEL, params, prompts, key, max_new_tokens=limit, eos_id=None, pad_id=tiny.PAD)
    )
    score, score_exactly = (jax.jit(partial(sequence_token_logprobs, model)) for model in (MODEL, tiny.MODEL))
    params = tiny.init_params()
    done = sample(params, jax.random.key(1))
    trained = score(params, done.tokens, done.segment_ids)
    mask = np.asarray(done.completion_mask)
    assert done.logprobs.dtype == trained.dtype == jnp.float32
    gaps = np.abs(np.asarray(done.logprobs) - np.asarray(trained))[mask]
    exact = score_exactly(params, done.tokens, done.segment_ids)
    assert gaps.max() < 1e-5  # of the ratio, too
    assert np.abs(np.asarray(exact) - np.asarray(trained))[mask].max() > 1e-3  # what rounding does otherwise


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One Llama, float32 and bfloat16."""
    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=False)
    params = transformer.init(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)  # norms, too
    folder = tmp_path_factory.mktemp("llama")
    huggingface.save(folder / "float32", params, huggingface.llama_config(config))
    return folder, config, params


def test_frozen_bfloat16_scores_like_float32(checkpoints):
    """With bfloat16 compute the matrices are the same numbers; norm scales are rounded, once each."""
    folder, config, params = checkpoints
    frozen = huggingface.load(folder / "float32", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(frozen.params)} == {jnp.dtype(jnp.bfloat16)}
    half = dataclasses.replace(config, dtype="bfloat16")
    mine, theirs = logits_of(frozen.params, half), logits_of(params, half)
    exact = np.asarray(logits_of(params, config))
    size = np.sqrt((exact**2).mean())
    for found in (mine, theirs):
        assert 0 < np.sqrt(((np.asarray(found) - exact) ** 2).mean()) < U * roundings(half) ** 0.5 * size
    same = {**frozen.params, "layers": dict(frozen.params["layers"])}
    for name in ("attention_norm", "mlp_norm"):
        same["layers"][name] = params["layers"][name]
    same["final_norm"] = params["final_norm"]
    np.testing.assert_array_equal(logits_of(same, half), theirs)


def test_offsets_of_norms_are_added_in_float32():
    """1 + w of Gemma: a stored bfloat16 w of 0.003 would vanish beside 1, and move logits by some 1e-2."""
    config = dataclasses.replace(NETWORKS["Gemma"], dtype="float32")
    params = transformer.init(jax.random.key(0), config)
    names = [name for name in params["layers"] if "norm" in name]
    layers = {**params["layers"], **{name: jnp.full_like(params["layers"][name], 0.003) for name in names}}
    exact = {**params, "layers": layers, "final_norm": jnp.full_like(params["final_norm"], 0.003)}
    rounded = {**exact, "layers": {n: x.astype(jnp.bfloat16) if n in names else x for n, x in layers.items()}}
    rounded["final_norm"] = exact["final_norm"].astype(jnp.bfloat16)
    np.testing.assert_allclose(logits_of(rounded, config), logits_of(exact, config), rtol=0, atol=1e-4)


def test_bfloat16_files_are_bit_identical(checkpoints, tmp_path):
    folder, _, params = checkpoints
    half = huggingface.load(folder / "float32", dtype=jnp.bfloat16)
    huggingface.save(tmp_path / "half", half.params, half.hf_config, max_shard_bytes=3000)
    again = huggingface.load(tmp_path / "half", dtype=jnp.bfloat16)
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2

    def bits(x):
        return np.asarray(x).view(np.uint16)

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), again.params, half.params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), half.params, rounded)
    wider = huggingface.load(tmp_path / "half")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), wider.params, half.params)


POLICIES = {
    "nothing is kept": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
    "products with weights": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "no names": jax.checkpoint_policies.save_only_these_names("none"),
    "either": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable
    ),
}


@pytest.fixture(scope="module")
def plain_gradient():
    return gradient(tiny.CONFIG)


def gradient(config):
    objective = sft(transformer.causal_model(config))
    return jax.jit(jax.grad(lambda params: objective(params, TEXTS)[0]))(tiny.init_params())


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_of_remat_changes_a_gradient(name, plain_gradient):
    config = dataclasses.replace(tiny.CONFIG, remat=True, remat_policy=POLICIES[name])
    limit = 1e-6 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain_gradient))
    found = gradient(config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=limit), found, plain_gradient)
