"""Every family against the torch model of transformers: logits under every option, padding, packing, decoding, gradients."""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import architecture, huggingface, transformer
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.heads import sequence_scores
from rlhf_jax.objectives import sft
from rlhf_jax.types import PromptBatch, SequenceBatch

torch = pytest.importorskip("torch", reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own

VOCAB, LENGTH, TOLERANCE = 96, 24, 2e-5
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEOX = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
GEMMA = {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20}


def rope(kind: str, **values) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


ORIGINAL = {"original_max_position_embeddings": 16}
LONG = {"short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.0, 3.0, 4.0, 5.0]}
CASES = {
    "Llama": ("llama", SHAPE),
    "Llama, one head per key": ("llama", {**SHAPE, "num_key_value_heads": 4}),
    "Llama, biases, tied, wide heads": (
        "llama",
        {**SHAPE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "Llama 3 rope": (
        "llama",
        SHAPE | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    ),
    "linear rope": ("llama", SHAPE | rope("linear", factor=4.0)),
    "dynamic rope": ("llama", SHAPE | rope("dynamic", factor=4.0)),
    "YaRN": ("llama", SHAPE | rope("yarn", factor=4.0, **ORIGINAL)),
    "YaRN, its options": (
        "llama",
        SHAPE | rope("yarn", factor=4.0, beta_fast=8.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.4, **ORIGINAL),
    ),
    "YaRN, given length": ("llama", SHAPE | rope("yarn", factor=4.0, attention_factor=1.3, truncate=False, **ORIGINAL)),
    "Mistral, window": ("mistral", {**SHAPE, "sliding_window": 7}),
    "Mistral, no window": ("mistral", {**SHAPE, "sliding_window": None}),
    "Qwen 2": ("qwen2", SHAPE),
    "Qwen 2, late windows": (
        "qwen2",
        {**SHAPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "Qwen 3": ("qwen3", {**SHAPE, "head_dim": 16}),
    "Qwen 3, biases": ("qwen3", {**SHAPE, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "Gemma 2": ("gemma2", SHAPE | GEMMA),
    "Gemma 2, no caps": ("gemma2", SHAPE | GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "Gemma 3": ("gemma3_text", SHAPE | GEMMA | {"num_hidden_layers": 7}),
    "Gemma 3, scaled": (
        "gemma3_text",
        SHAPE
        | GEMMA
        | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "Phi-3": ("phi3", {**SHAPE, "sliding_window": 7}),
    "Phi-3, LongRoPE": ("phi3", {**SHAPE, "original_max_position_embeddings": 64} | rope("longrope", **LONG)),
    "Phi-3, partial": ("phi3", SHAPE | rope("default", partial_rotary_factor=0.5)),
    "GPT-2": ("gpt2", GPT2),
    "GPT-2, untied, wide": ("gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "GPT-NeoX": ("gpt_neox", NEOX),
    "GPT-NeoX, half turns": ("gpt_neox", NEOX | rope("default", partial_rotary_factor=0.5)),
    "GPT-NeoX, serial, no attention biases": (
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False},
    ),
    "OLMo 2": ("olmo2", SHAPE),
    "OLMo 2, tied": ("olmo2", {**SHAPE, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "Mixtral": ("mixtral", {**SHAPE, "num_local_experts": 4}),
    "Mixtral, window": ("mixtral", {**SHAPE, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6}),
    "Qwen 3 MoE": ("qwen3_moe", SHAPE | EXPERTS | {"norm_topk_prob": True}),
    "Qwen 3 MoE, raw shares": ("qwen3_moe", SHAPE | EXPERTS | {"tie_word_embeddings": True}),
}


def torch_model(kind: str, values: dict, make=None):
    """A torch model with random weights, norms and biases included."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **values)
    model = (make or transformers.AutoModelForCausalLM).from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    kind, values = CASES[request.param]
    model = torch_model(kind, values)
    folder = tmp_path_factory.mktemp("models") / "theirs"
    model.save_pretrained(folder)
    return model, folder, huggingface.load(folder)


@functools.cache
def jitted_logits(config):
    """One compilation for all rows of a network that have one shape."""

    def run(params, tokens, segment_ids):
        states, _ = transformer.hidden(params, config, tokens, positions_from_segments(segment_ids), segment_ids)
        return transformer.unembed(params, config, states)

    return jax.jit(run)


def logits_of(loaded, tokens, segment_ids) -> np.ndarray:
    return np.asarray(jitted_logits(loaded.config)(loaded.params, jnp.asarray(tokens), jnp.asarray(segment_ids)))


def torch_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def relative_error(mine, theirs) -> float:
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def test_logits_padding_and_packing(case):
    model, _, loaded = case
    assert worst_error(model, loaded) <= TOLERANCE


def worst_error(model, loaded) -> float:
    """Over rows of 24 and 15 tokens: padded right, padded left, and packed into one."""
    rng = np.random.default_rng(0)
    long, short = rng.integers(3, VOCAB, LENGTH), rng.integers(3, VOCAB, 15)
    expected = [torch_logits(model, row[None])[0] for row in (long, short)]
    right = np.stack([np.pad(long, (0, 15)), np.pad(short, (0, LENGTH)), np.concatenate([long, short])])
    segments = np.repeat([[1] * LENGTH + [0] * 15, [1] * 15 + [0] * LENGTH, [1] * LENGTH + [2] * 15], 1, axis=0)
    mine = logits_of(loaded, right, segments)
    found = [mine[0, :LENGTH], mine[1, :15], mine[2, :LENGTH], mine[2, LENGTH:]]
    left = np.stack([np.roll(row, shift) for row, shift in zip(right, (15, LENGTH, 0), strict=True)])
    moved = np.stack([np.roll(row, shift) for row, shift in zip(segments, (15, LENGTH, 0), strict=True)])
    mine = logits_of(loaded, left, moved)
    found += [mine[0, 15:], mine[1, LENGTH:]]
    return max(relative_error(a, b) for a, b in zip(found, expected * 3, strict=True))


def test_bfloat16_stays_close_to_float32(case):
    """Root mean square of the logits' error at most 3 times that of the same float32 network with rounded parameters.

    A layer rounds 7 matrices, which the second network does too, and up to 17 times what flows between them. Like
    random steps they add up to sqrt(24 / 7) = 1.9 times as much, were all of equal effect; measured 1.3 to 2.1 times.
    A router may choose another of two nearly equal experts, no small error: the median token counts there.
    """
    _, _, loaded = case
    half = loaded._replace(config=dataclasses.replace(loaded.config, dtype="bfloat16"))
    rounded = loaded._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), loaded.params))
    tokens = np.random.default_rng(6).integers(3, VOCAB, (3, LENGTH + 15))
    segments = np.repeat([[1] * LENGTH + [2] * 15], 3, axis=0)
    exact = logits_of(loaded, tokens, segments)
    middle = np.median if loaded.config.num_experts else np.mean

    def error(other) -> float:
        found = logits_of(other, tokens, segments)
        assert found.dtype == np.float32
        return float(middle(np.square(found - exact).mean(axis=-1)) / np.square(exact).mean()) ** 0.5

    assert 2.0**-9 < error(half) < 3 * error(rounded) < 0.2


def test_round_trip_is_exact(case, tmp_path):
    model, _, loaded = case
    huggingface.save(tmp_path / "ours", loaded.params, loaded.hf_config)
    again = huggingface.load(tmp_path / "ours")
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = np.random.default_rng(1).integers(3, VOCAB, (2, LENGTH))
    np.testing.assert_array_equal(torch_logits(theirs, tokens), torch_logits(model, tokens))


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Gemma 3", "GPT-2", "GPT-NeoX", "Mixtral", "Mistral, window"])
def test_greedy_text_is_equal_for_64_tokens(name, tmp_path):
    """Two prompts of unequal length, the shorter one left-padded.

    Their greedy text is ours where, at every token, their likeliest one after our text so far is ours: one forward.
    """
    model = torch_model(*CASES[name])
    model.save_pretrained(tmp_path / "theirs")
    config, params, _ = huggingface.load(tmp_path / "theirs")
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, VOCAB, size) for size in (9, 5)]
    batch = PromptBatch(
        jnp.asarray([prompts[0], np.pad(prompts[1], (4, 0))]), jnp.asarray([[True] * 9, [False] * 4 + [True] * 5])
    )
    sample = jax.jit(
        lambda p, b: generate(
            transformer.causal_model(config), p, b, jax.random.key(0), max_new_tokens=64, eos_id=None, pad_id=0, top_k=1
        )
    )
    completions = np.asarray(sample(params, batch).tokens[:, 9:])
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = np.asarray(torch_logits(model, [[*prompt, *completion]])[0])
        np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(axis=-1), completion)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "GPT-NeoX", "OLMo 2", "Qwen 3 MoE", "Phi-3"])
def test_gradients_of_an_sft_step_agree(name, tmp_path):
    """Written out as a checkpoint, the gradient of our objective is the gradient that torch finds."""
    model = torch_model(*CASES[name])
    model.save_pretrained(tmp_path / "theirs")
    config, params, _ = huggingface.load(tmp_path / "theirs")
    tokens = np.random.default_rng(3).integers(3, VOCAB, (2, 12))
    mask = np.zeros((2, 12), bool)
    mask[0, 4:], mask[1, 7:] = True, True
    batch = SequenceBatch(jnp.asarray(tokens), jnp.ones((2, 12), jnp.int32), jnp.asarray(mask))

    @jax.jit
    def gradient(params):
        def loss(p):
            total, weight, _ = sft(transformer.causal_model(config))(p, batch)
            return total / weight

        return jax.grad(loss)(params)

    logits = model(torch.tensor(tokens)).logits[:, :-1]
    chosen = torch.tensor(mask[:, 1:])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(tokens[:, 1:]), reduction="none")
    (losses * chosen).sum().div(chosen.sum()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path / "gradient")
    theirs = huggingface.load(tmp_path / "gradient").params
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), gradient(params), theirs)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Gemma 3", "GPT-2", "GPT-NeoX", "Mixtral", "Qwen 3"])
def test_reward_models_in_and_out(name, tmp_path):
    kind, values = CASES[name]
    make = transformers.AutoModelForSequenceClassification
    model = torch_model(kind, {**values, "num_labels": 1, "pad_token_id": 0}, make)
    model.save_pretrained(tmp_path / "theirs")
    config, params, hf_config = huggingface.load_reward_model(tmp_path / "theirs")
    rng = np.random.default_rng(4)
    tokens = np.stack([rng.integers(3, VOCAB, 14), np.pad(rng.integers(3, VOCAB, 9), (0, 5))])
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), attention_mask=torch.tensor(tokens > 0)).logits[:, 0].numpy()
    segments = jnp.asarray((tokens > 0).astype(np.int32))
    score = jax.jit(lambda p: sequence_scores(transformer.causal_model(config), p, jnp.asarray(tokens), segments))
    np.testing.assert_allclose(score(params), theirs, rtol=1e-4, atol=2e-5)
    huggingface.save_reward_model(tmp_path / "ours", params, hf_config, pad_token_id=0)
    again = make.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        same = again(torch.tensor(tokens), attention_mask=torch.tensor(tokens > 0)).logits[:, 0].numpy()
    np.testing.assert_array_equal(same, theirs)
    biased = {**params, "head": {**params["head"], "bias": jnp.asarray(0.5)}}
    with pytest.raises(ValueError, match=r"the head's bias is 0.5, and the format has no place for it"):
        huggingface.save_reward_model(tmp_path / "biased", biased, hf_config, pad_token_id=0)


@pytest.mark.parametrize("name", ["dynamic rope", "Phi-3, LongRoPE"])
def test_ropes_that_depend_on_the_length_of_the_text(name, tmp_path):
    """Beyond the original length transformers switches to other frequencies, for which ours are asked."""
    kind, values = CASES[name]
    shorter = {"max_position_embeddings": 16} if kind == "llama" else {"original_max_position_embeddings": 16}
    model = torch_model(kind, {**values, **shorter})
    model.save_pretrained(tmp_path / "theirs")
    loaded = huggingface.load(tmp_path / "theirs")
    tokens = np.random.default_rng(5).integers(3, VOCAB, (1, LENGTH))
    expected = torch_logits(model, tokens)
    longer = loaded._replace(config=architecture.for_length(loaded.config, LENGTH))
    assert relative_error(logits_of(longer, tokens, np.ones_like(tokens)), expected) <= TOLERANCE
    assert relative_error(logits_of(loaded, tokens, np.ones_like(tokens)), expected) > 1e-3


def test_every_family_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


if __name__ == "__main__":
    print("| network | error |\n|---|---|")
    for name, (kind, values) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = torch_model(kind, values)
            model.save_pretrained(folder)
            print(f"| {name} | {worst_error(model, huggingface.load(folder)):.1e} |", flush=True)
