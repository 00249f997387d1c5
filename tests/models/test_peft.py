"""Adapters in PEFT's folders: each side loads what the other wrote, with the same logits; all else is refused."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import transformer
from rlhf_jax.models.huggingface import load, transformer_config
from rlhf_jax.models.lora import init_lora, lora_model, lora_specs, matrices
from rlhf_jax.models.parameters import is_spec
from rlhf_jax.models.peft import load_adapter, save_adapter

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
CONFIGS = {
    "llama": {
        "model_type": "llama", **SIZES, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", **SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 64,
        "rotary_pct": 0.5, "use_parallel_residual": True, "tie_word_embeddings": False,
    },
    "phi3": {
        "model_type": "phi3", **SIZES, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "original_max_position_embeddings": 64, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
EXPERTS = {
    **CONFIGS["llama"], "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2,
    "sliding_window": None,
}  # fmt: skip
MODULES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 7)).astype(np.int32)


def adapter_of(config, *, rank=3, targets=None, seed=0):
    rng = np.random.default_rng(seed)
    specs = lora_specs(config, rank=rank, targets=targets or matrices(config))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), specs, is_leaf=is_spec)


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(scope="module")
def frameworks():
    return pytest.importorskip("torch"), pytest.importorskip("transformers"), pytest.importorskip("peft")


def torch_model(frameworks, family):
    torch, transformers, _ = frameworks
    torch.manual_seed(0)
    values = {name: value for name, value in CONFIGS[family].items() if name != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def torch_logits(frameworks, model):
    with frameworks[0].no_grad():
        return model(frameworks[0].asarray(TOKENS, dtype=frameworks[0].int64)).logits.numpy()


def close(ours, theirs, base):
    """Equal to rounding, and an adapter that matters."""
    scale = np.abs(theirs).max()
    assert np.abs(np.asarray(ours) - theirs).max() <= 2e-5 * scale
    assert np.abs(theirs - base).max() > 1e-2 * scale


def our_logits(directory, config, adapter, scale):
    model = lora_model(transformer.causal_model(config), scale=scale)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    @jax.jit
    def run(params):
        states, _ = model.hidden(params, TOKENS, positions, jnp.ones_like(TOKENS))
        return model.unembed(params, states)

    return run({"base": load(directory).params, "adapter": adapter})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft calls transformers
@pytest.mark.parametrize("family", CONFIGS)
def test_both_directions_with_peft(family, frameworks, tmp_path):
    torch, _, peft = frameworks
    model = torch_model(frameworks, family)
    model.save_pretrained(tmp_path / "base")
    base = torch_logits(frameworks, model)
    hf_config = json.loads((tmp_path / "base" / "config.json").read_text())
    config = transformer_config(hf_config)

    ours = adapter_of(config)
    save_adapter(tmp_path / "ours", ours, hf_config, rank=3, alpha=1.5)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    close(our_logits(tmp_path / "base", config, ours, 0.5), torch_logits(frameworks, wrapped), base)

    model = wrapped.unload()
    options = {"r": 2, "lora_alpha": 3, "target_modules": MODULES[family], "use_rslora": family == "llama"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options, fan_in_fan_out=family == "gpt2")).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs, scale = load_adapter(tmp_path / "theirs", hf_config)
    assert scale == pytest.approx(3 / 2**0.5 if family == "llama" else 1.5)
    assert set(theirs) == set(matrices(config))
    close(our_logits(tmp_path / "base", config, theirs, scale), torch_logits(frameworks, wrapped), base)

    save_adapter(tmp_path / "again", theirs, hf_config, rank=2, alpha=2 * scale)
    same = load_file(tmp_path / "again" / "adapter_model.safetensors")
    equal(same, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))


@pytest.mark.parametrize("family", CONFIGS)
def test_saved_and_loaded_product_is_the_same(family, tmp_path):
    """Also of some matrices of a fused module, whose others then get a zero."""
    hf_config = CONFIGS[family]
    config = transformer_config(hf_config)
    ours = adapter_of(config, rank=2, targets=("query", "value", "up"))
    save_adapter(tmp_path / "some", ours, hf_config, rank=2, alpha=5.0)
    theirs, scale = load_adapter(tmp_path / "some", hf_config)
    assert scale == pytest.approx(2.5)
    assert set(theirs) >= set(ours)
    for name, pair in theirs.items():
        products = [
            np.matmul(p["a"].reshape(2, -1, p["a"].shape[-1]), p["b"].reshape(2, p["b"].shape[1], -1))
            for p in (pair, ours.get(name, {"a": pair["a"], "b": jnp.zeros_like(pair["b"])}))
        ]
        np.testing.assert_allclose(products[0], products[1], rtol=1e-5, atol=1e-6)
    if family == "llama":
        equal(theirs, ours)


def test_config_names_what_is_adapted(tmp_path):
    def written(name, targets, family="gpt2", **options):
        config = transformer_config(CONFIGS[family])
        adapter = adapter_of(config, rank=2, targets=targets)
        save_adapter(tmp_path / name, adapter, CONFIGS[family], rank=2, alpha=4, **options)
        return json.loads((tmp_path / name / "adapter_config.json").read_text())

    only_attention = written("a", ("out", "up"))
    assert only_attention["target_modules"] == ["attn.c_proj", "c_fc"]  # "c_proj" alone would be the MLP's, too
    assert (only_attention["r"], only_attention["lora_alpha"], only_attention["fan_in_fan_out"]) == (2, 4, True)
    fused = written("b", ("query", "key", "out", "down"), base_model_name="gpt2")
    assert fused["target_modules"] == ["c_attn", "c_proj"]
    assert (fused["r"], fused["lora_alpha"], fused["base_model_name_or_path"]) == (4, 8, "gpt2")
    llama = written("c", ("query",), family="llama")
    assert (llama["target_modules"], llama["fan_in_fan_out"]) == (["q_proj"], False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.fixture
def folder(tmp_path):
    """A plain Llama adapter, and a function that writes it again with changes."""
    hf_config = CONFIGS["llama"]
    adapter = adapter_of(transformer_config(hf_config), rank=2, targets=("query", "out"))
    save_adapter(tmp_path / "plain", adapter, hf_config, rank=2, alpha=2)
    values = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")

    def write(tensor_changes=None, **changes):
        path = tmp_path / "changed"
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps({**values, **changes}))
        own = {name: x for name, x in {**tensors, **(tensor_changes or {})}.items() if x is not None}
        save_file(own, path / "adapter_model.safetensors")
        return path

    return write


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True.*Nothing was loaded"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow = 1"),
        ({"peft_type": "IA3"}, "not the config of a LoRA adapter"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"r": 4}, r"lora_A.weight is \(2, 32\), not \(4, 32\)"),
        ({"target_modules": ["q_proj", "o_proj", "v_proj"]}, "missing .*v_proj.lora_A"),
        ({"tensor_changes": {Q.format("A"): None, Q.format("B"): None}}, "missing .*layers.1.self_attn.q_proj.lora_A"),
        ({"tensor_changes": {Q.format("B"): np.zeros((30, 2), np.float32)}}, r"q_proj.lora_B.weight is \(30, 2\), not"),
        ({"tensor_changes": {"base_model.model.lm_head.lora_A.weight": np.zeros(2)}}, "unknown .*lm_head.lora_A"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_is_not_plain_lora_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(folder(**changes), CONFIGS["llama"])


def test_a_field_that_excludes_is_believed(folder):
    path = folder(target_modules=["q_proj", "o_proj", "v_proj"], exclude_modules=["v_proj"])
    assert set(load_adapter(path, CONFIGS["llama"]).adapter) == {"query", "out"}
    assert set(load_adapter(folder(target_modules=r".*\.(q|o)_proj"), CONFIGS["llama"]).adapter) == {"query", "out"}


def test_missing_files_and_pickles_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: no such file"):
        load_adapter(tmp_path, CONFIGS["llama"])
    path = folder()
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is a pickle, .* not opened"):
        load_adapter(path, CONFIGS["llama"])


def test_save_refuses_what_would_not_load(tmp_path):
    hf_config = CONFIGS["llama"]
    adapter = adapter_of(transformer_config(hf_config), rank=2, targets=("query",))
    save = partial(save_adapter, hf_config=hf_config, alpha=2)
    with pytest.raises(ValueError, match="not an adapter of rank 4"):
        save(tmp_path / "new", adapter, rank=4)
    with pytest.raises(FileExistsError, match="never overwritten"):
        save(tmp_path, adapter, rank=2)
    adapter = init_lora(jax.random.key(0), transformer_config(EXPERTS), rank=2, targets=("up",))
    with pytest.raises(ValueError, match=r"adapter of \['up'\]: PEFT has no common format for experts"):
        save_adapter(tmp_path / "new", adapter, EXPERTS, rank=2, alpha=2)
    assert not list(tmp_path.iterdir())


def test_of_experts_only_the_attention_goes_in_and_out(tmp_path):
    """Both ways in which PEFT has stored adapters of experts are refused: fused parameters, and a module per expert."""
    adapter = adapter_of(transformer_config(EXPERTS), rank=2, targets=("query", "out"))
    save_adapter(tmp_path / "attention", adapter, EXPERTS, rank=2, alpha=6)
    again = load_adapter(tmp_path / "attention", EXPERTS)
    assert again.scale == 3
    equal(again.adapter, adapter)
    path = tmp_path / "attention" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "target_parameters": ["mlp.experts.down_proj"]}))
    with pytest.raises(ValueError, match=r"found target_parameters = \['mlp.experts.down_proj'\]. Nothing was loaded"):
        load_adapter(tmp_path / "attention", EXPERTS)
    path.write_text(json.dumps({**values, "target_modules": ["q_proj", "o_proj", "w1"]}))
    tensors = load_file(path.with_name("adapter_model.safetensors"))
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight"
    save_file({**tensors, name: np.zeros((2, 32), np.float32)}, path.with_name("adapter_model.safetensors"))
    with pytest.raises(ValueError, match=rf"unknown {name}. Nothing was loaded"):
        load_adapter(tmp_path / "attention", EXPERTS)


def test_bfloat16_keeps_its_bits(tmp_path):
    hf_config = CONFIGS["gpt2"]
    ours = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter_of(transformer_config(hf_config), targets=("query",)))
    save_adapter(tmp_path / "half", ours, hf_config, rank=3, alpha=3)
    theirs = load_adapter(tmp_path / "half", hf_config, dtype=jnp.bfloat16).adapter
    equal(theirs["query"], ours["query"])
    assert {theirs["query"]["a"].dtype, load_adapter(tmp_path / "half", hf_config).adapter["query"]["a"].dtype} == {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),
    }
    assert not np.asarray(theirs["key"]["b"], np.float32).any()
