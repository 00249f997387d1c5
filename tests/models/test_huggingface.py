"""Checkpoint folders without torch: exact round trips, shards, shardings, and everything that must be refused whole."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.tensor_files import INDEX, SINGLE
from rlhf_jax.runtime.sharding import make_mesh, named_shardings

HF_CONFIG = huggingface.llama_config(tiny.CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    huggingface.save(folder, tiny.init_params(), HF_CONFIG)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def test_what_was_saved_is_loaded(saved):
    loaded = huggingface.load(saved)
    assert loaded.config == tiny.CONFIG
    equal(loaded.params, tiny.init_params())
    assert loaded.hf_config["architectures"] == ["LlamaForCausalLM"]
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", SINGLE]


def test_names_and_orientation_by_hand(saved):
    """Llama's own names; torch's linear layers are `[out, in]`, heads side by side."""
    tensors, layers = load_file(saved / SINGLE), tiny.init_params()["layers"]
    assert len(tensors) == 2 + 2 * 9
    query = np.asarray(layers["query"][1])
    for head, dim, column in ((0, 0, 0), (3, 2, 5), (1, 3, 15)):
        assert tensors["model.layers.1.self_attn.q_proj.weight"][head * 4 + dim, column] == query[column, head, dim]
    out = np.asarray(layers["out"][0])
    assert tensors["model.layers.0.self_attn.o_proj.weight"][7, 2 * 4 + 1] == out[2, 1, 7]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(tmp_path, dtype):
    """Stored in the parameters' dtype; read into any."""
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.init_params())
    huggingface.save(tmp_path / "half", params, HF_CONFIG)
    equal(huggingface.load(tmp_path / "half", dtype=dtype).params, params)
    equal(huggingface.load(tmp_path / "half").params, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype


def test_shards_and_their_index(tmp_path):
    params = tiny.init_params()
    huggingface.save(tmp_path / "many", params, HF_CONFIG, max_shard_bytes=3_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    equal(huggingface.load(tmp_path / "many").params, params)


def test_parameters_are_born_sharded(saved):
    mesh = make_mesh(data=1, fsdp=2)
    loaded = huggingface.load(saved, shard_fn=partial(named_shardings, mesh=mesh))
    equal(loaded.params, tiny.init_params())
    gate = loaded.params["layers"]["gate"]
    assert gate.sharding.mesh == mesh
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 8, 24)}


def test_a_reward_model_is_born_sharded_head_and_all(tmp_path):
    scorer = tiny.init_frozen().reward_params
    huggingface.save_reward_model(tmp_path / "scorer", scorer, HF_CONFIG, pad_token_id=tiny.PAD)
    place = partial(named_shardings, mesh=make_mesh(data=1, fsdp=2))
    loaded = huggingface.load_reward_model(tmp_path / "scorer", shard_fn=place).params
    equal(loaded, scorer)
    assert loaded["head"]["weight"].sharding.shard_shape((16,)) == (8,)
    assert loaded["trunk"]["layers"]["gate"].sharding.shard_shape((2, 16, 24)) == (2, 8, 24)


def test_extra_files_and_never_half_a_folder(tmp_path):
    def card(folder):
        (folder / "README.md").write_text("made by a test")

    huggingface.save(tmp_path / "one", tiny.init_params(), HF_CONFIG, extra_files=card)
    assert (tmp_path / "one" / "README.md").read_text() == "made by a test"
    with pytest.raises(FileExistsError, match="is never overwritten"):
        huggingface.save(tmp_path / "one", tiny.init_params(), HF_CONFIG)

    def fail(folder):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        huggingface.save(tmp_path / "two", tiny.init_params(), HF_CONFIG, extra_files=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_parameters_of_another_network_are_not_written(tmp_path):
    params = tiny.init_params()
    wrong = {**params, "final_norm": jnp.ones(7)}
    with pytest.raises(ValueError, match=r"\['final_norm'\] is \(7,\), not \(16,\). Nothing was written"):
        huggingface.save(tmp_path / "wrong", wrong, HF_CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_no_llama_has_no_llama_config():
    other = transformer.TransformerConfig(vocab_size=9, layer_norm=True, gated=False)
    with pytest.raises(ValueError, match="is no Llama"):
        huggingface.llama_config(other)


TENSOR_FAULTS = {
    "missing model.norm.weight": lambda t: t.pop("model.norm.weight"),
    "unexpected model.layers.7.mlp.up_proj.weight": lambda t: t.update(
        {"model.layers.7.mlp.up_proj.weight": np.zeros((24, 16), np.float32)}
    ),
    r"model.layers.0.mlp.up_proj.weight is \(16, 24\), config.json says \(24, 16\)": lambda t: t.update(
        {"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.copy()}
    ),
    "unexpected lm_head.weight": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
}


@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_wrong_tensors_are_refused(folder, message):
    edit_tensors(folder, TENSOR_FAULTS[message])
    with pytest.raises(ValueError, match=f"{message}.*Nothing was loaded"):
        huggingface.load(folder)


def test_a_tied_copy_and_known_buffers_are_no_fault(folder):
    edit_tensors(
        folder,
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
            }
        ),
    )
    equal(huggingface.load(folder).params, tiny.init_params())


CONFIG_FAULTS = {
    "model_type 'unheard_of' is unknown here; known: llama": {"model_type": "unheard_of"},
    "auto_map asks to run code of the checkpoint, which is never done": {"auto_map": {"AutoModel": "model.Model"}},
    "quantised weights are not read": {"quantization_config": {"bits": 4}},
    "nobody here reads residual_multiplier, which might change": {"residual_multiplier": 0.2},
    "hidden_act = 'mish' is unknown here; known: silu": {"hidden_act": "mish"},
    "rope_type 'spiral' is unknown here": {"rope_scaling": {"rope_type": "spiral"}},
    "no field 'num_hidden_layers'": {"num_hidden_layers": None},
    "pretraining_tp = 2 is not supported, only 1": {"pretraining_tp": 2},
}


@pytest.mark.parametrize("message", CONFIG_FAULTS)
def test_wrong_configs_are_refused(folder, message):
    edit_config(folder, **CONFIG_FAULTS[message])
    with pytest.raises(ValueError, match=message):
        huggingface.load(folder)


def test_harmless_fields_can_be_named(folder, tmp_path):
    edit_config(folder, residual_multiplier=0.2)
    loaded = huggingface.load(folder, ignore=("residual_multiplier",))
    assert loaded.config == tiny.CONFIG
    with pytest.raises(ValueError, match="nobody here reads residual_multiplier"):
        huggingface.save(tmp_path / "out", loaded.params, loaded.hf_config)
    huggingface.save(tmp_path / "out", loaded.params, loaded.hf_config, ignore=("residual_multiplier",))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["residual_multiplier"] == 0.2


def test_files_that_cannot_be_read_whole(folder):
    path, whole = folder / SINGLE, (folder / SINGLE).read_bytes()
    for cut, message in ((len(whole) - 100, "cut at byte"), (50, "cut within its header"), (3, "no safetensors file")):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=message):
            huggingface.load(folder)
    path.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(ValueError, match="its header is no JSON"):
        huggingface.load(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model.bin are pickles, which can run code and are not opened"
    ):
        huggingface.load(folder)


def test_an_index_that_leaves_the_folder_or_promises_too_much(folder, tmp_path):
    (folder / SINGLE).rename(tmp_path / "outside.safetensors")
    for name, message in (
        ("../outside.safetensors", "lies outside of the folder"),
        (str(tmp_path / "outside.safetensors"), "lies outside of the folder"),
        ("absent.safetensors", "shard absent.safetensors is missing"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ValueError, match=message):
            huggingface.load(folder)
    shutil.copy(tmp_path / "outside.safetensors", folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"ghost": "a.safetensors"}}))
    with pytest.raises(ValueError, match="no shard holds ghost"):
        huggingface.load(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="no JSON object with a weight_map"):
        huggingface.load(folder)


def test_no_config_or_a_broken_one(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        huggingface.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        huggingface.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="give a folder that holds a Hugging Face checkpoint"):
        huggingface.load(folder)


def test_a_reward_model_has_one_label(folder):
    edit_config(folder, id2label={"0": "bad", "1": "good"})
    with pytest.raises(ValueError, match="2 labels; a reward model has one"):
        huggingface.load_reward_model(folder)
