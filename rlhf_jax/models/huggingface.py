"""Checkpoints of the Hugging Face ecosystem in and out: `config.json` and safetensors, read and written exactly.

    config, params, hf_config = load("runs/llama")              # any folder that transformers can save
    save("out", params, hf_config)                              # any folder that transformers can load

Which architectures, and how each lies in its files, is said in `models.families`. Weights are only ever data here: no
pickle is opened and no code of a checkpoint is run.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from rlhf_jax.models.architecture import TransformerConfig, param_specs
from rlhf_jax.models.families import FAMILIES, Entry, Family
from rlhf_jax.models.hf_configs import Fields
from rlhf_jax.models.parameters import ParamSpec, is_spec
from rlhf_jax.models.tensor_files import Stored, find_tensors, read_object, write_tensors
from rlhf_jax.types import Params

HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "bad_words_ids", "begin_suppress_tokens",
        "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop",
        "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "label2id", "model_type",
        "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "resid_pdrop",
        "return_dict", "router_aux_loss_coef", "router_jitter_noise", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype",
        "transformers_version", "use_cache", "is_decoder", "is_encoder_decoder", "add_cross_attention", "n_ctx",
        "output_router_logits", "reorder_and_upcast_attn", "mlp_only_layers", "max_position_embeddings",
        "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "layer_types", "max_window_layers",
    }
)  # fmt: skip
"""Fields of `config.json` that change nothing in the network, or only where another field, which is read, says so."""


class Pretrained(NamedTuple):
    """A loaded checkpoint."""

    config: TransformerConfig
    params: Params
    hf_config: dict[str, Any]
    """The file's own words; `save` writes them back."""


def read_config(directory: Path | str) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no JSON object, asks for code of its own (`auto_map`) or for quantised weights.
    """
    path = Path(directory) / "config.json"
    values = read_object(path, missing="give a folder that holds a Hugging Face checkpoint")
    if values.get("auto_map"):
        raise ValueError(
            f"{path}: auto_map asks to run code of the checkpoint, which is never done. Nothing was loaded"
        )
    if values.get("quantization_config"):
        raise ValueError(f"{path}: quantised weights are not read. Fix: save the model in float32, bfloat16 or float16")
    return values


def transformer_config(
    hf_config: dict[str, Any], *, where: str = "config.json", ignore: Sequence[str] = ()
) -> TransformerConfig:
    """The `TransformerConfig` that a `config.json` describes.

    Raises `ValueError` for an unknown `model_type`, a value that the network here does not have, and a field that nobody
    reads, which might change the mathematics; `ignore` names fields that you know to be harmless.
    """
    family = _family(hf_config, where)
    fields = Fields(hf_config, where)
    config = family.config(fields)
    left = fields.leftover(HARMLESS | set(ignore))
    if left:
        raise ValueError(
            f"{where}: nobody here reads {', '.join(left)}, which might change the mathematics. Nothing was loaded. Fix: "
            f"pass ignore={tuple(left)!r} if you know that they do not"
        )
    return config


def _family(hf_config: dict[str, Any], where: str) -> Family:
    kind = hf_config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {kind!r} is unknown here; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def llama_config(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a network that was made here, which is a Llama.

    Raises `ValueError` where it has something that Llama has not.
    """
    rope = config.kinds[0].rope
    values = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": None if rope is None else rope.base,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if network_of(transformer_config(values)) != network_of(config):
        raise ValueError(f"{config} is no Llama. Fix: write its config.json by hand and pass it as hf_config")
    return values


def network_of(config: TransformerConfig) -> tuple:
    """What of a config a checkpoint determines: all but how it is computed."""
    loops = {"remat", "remat_policy", "logits_chunk", "unroll", "layers_apart", "product_fn", "last_layer_where_read"}
    how = {"dtype", "attention_fn", "constrain_fn", "experts_fn", *loops}
    return tuple((name, value) for name, value in vars(config).items() if name not in how)


def load(
    directory: Path | str,
    *,
    dtype: Any = jnp.float32,
    shard_fn: Callable[[Any], Any] | None = None,
    ignore: Sequence[str] = (),
) -> Pretrained:
    """A language model.

    Every tensor is read once, and goes straight into the arrays' dtype and places: beside the result, host memory holds
    one tensor and, where devices have memory of their own, the array (of all layers) that is being filled.

    Args:
      directory: of `config.json` and safetensors.
      dtype: of the parameters; float32 for what will be trained.
      shard_fn: from the parameters' specs to their shardings, as `partial(named_shardings, mesh=mesh)`; None puts
        everything on the default device.
      ignore: fields of `config.json` that you know to be harmless.

    Raises:
      FileNotFoundError, ValueError: whatever cannot be read exactly, naming file and tensor; nothing is half-loaded.
    """
    hf_config = read_config(directory)
    config = transformer_config(hf_config, where=str(Path(directory) / "config.json"), ignore=ignore)
    params = _read_params(Path(directory), hf_config, config, dtype, shard_fn, head=False)
    return Pretrained(config, params, hf_config)


def load_reward_model(
    directory: Path | str,
    *,
    dtype: Any = jnp.float32,
    shard_fn: Callable[[Any], Any] | None = None,
    ignore: Sequence[str] = (),
) -> Pretrained:
    """A reward model, `{"trunk": ..., "head": ...}`: one label of `AutoModelForSequenceClassification`; as `load`.

    The trunk's config is tied, whatever the file says: there is no output matrix.
    """
    hf_config = read_config(directory)
    where = str(Path(directory) / "config.json")
    if len(hf_config.get("id2label", {0: ""})) != 1:
        raise ValueError(f"{where}: {len(hf_config['id2label'])} labels; a reward model has one. Nothing was loaded")
    config = dataclasses.replace(transformer_config(hf_config, where=where, ignore=ignore), tie_embeddings=True)
    trunk = _read_params(Path(directory), hf_config, config, dtype, shard_fn, head=True)
    weight = trunk.pop("score").reshape(-1)
    head = {"weight": weight.astype(jnp.float32), "bias": jnp.zeros((), jnp.float32)}
    return Pretrained(config, {"trunk": trunk, "head": head}, hf_config)


SCORE = Entry("score.weight", ("score",))


def _entries(family: Family, config: TransformerConfig, *, head: bool) -> list[tuple[Entry, list[tuple[int, ...]]]]:
    """The tensors of this network, each with the shapes of our arrays in it (one layer's, one expert's)."""
    specs, used = param_specs(config), []
    for entry in family.entries:
        tree = specs["layers"] if "{layer}" in entry.theirs else specs
        if any(name not in tree for name in entry.ours):
            continue
        skip = ("{layer}" in entry.theirs) + ("{expert}" in entry.theirs)
        used.append((entry, [tree[name].shape[skip:] for name in entry.ours]))
    return used + [(SCORE, [(1, config.model_dim)])] * head


def _places(entry: Entry, config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor name of an entry, with its index into our stacked arrays."""
    for layer in range(config.num_layers if "{layer}" in entry.theirs else 1):
        for expert in range(config.num_experts if "{expert}" in entry.theirs else 1):
            index = ((layer,) if "{layer}" in entry.theirs else ()) + ((expert,) if "{expert}" in entry.theirs else ())
            yield entry.theirs.format(layer=layer, expert=expert), index


def _read_params(directory, hf_config, config, dtype, shard_fn, *, head: bool) -> Params:
    family = _family(hf_config, str(directory / "config.json"))
    tensors = _with_prefix(find_tensors(directory), family)
    entries = _entries(family, config, head=head)
    _check_names(directory, tensors, family, config, entries)
    score = {"score": ParamSpec((1, config.model_dim), (None, "embed"), None)} if head else {}
    specs = {**param_specs(config), **score}
    shardings = None if shard_fn is None else shard_fn(specs)
    params: dict[str, Any] = {"layers": {}}
    for entry, shapes in entries:
        layered = "{layer}" in entry.theirs
        targets = []
        for name in entry.ours:
            tree, places = (specs["layers"], shardings and shardings["layers"]) if layered else (specs, shardings)
            targets.append(_Buffer(tree[name].shape, np.dtype(dtype), places and places[name]))
        for theirs, index in _places(entry, config):
            for target, part in zip(targets, entry.layout.split(tensors[theirs].read(), shapes), strict=True):
                target.fill(index, part)
        for name, target in zip(entry.ours, targets, strict=True):
            (params["layers"] if layered else params)[name] = target.array()
    return params


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes: what XLA takes over on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class _Buffer:
    """One array under construction: a piece of host memory for every device of this process."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> None:
        self.is_placed = sharding is not None
        self.shape, self.sharding = shape, sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.indices = {
            device: tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
            for device, index in self.sharding.addressable_devices_indices_map(shape).items()
        }
        self.pieces = {
            device: _aligned([part.stop - part.start for part in index], dtype)
            for device, index in self.indices.items()
        }

    def fill(self, at: tuple[int, ...], part: np.ndarray) -> None:
        """Put `part` at the leading indices `at`, into each device's piece as far as it holds them."""
        for device, index in self.indices.items():
            lead, rest = index[: len(at)], index[len(at) :]
            if all(cut.start <= i < cut.stop for i, cut in zip(at, lead, strict=True)):
                self.pieces[device][tuple(i - cut.start for i, cut in zip(at, lead, strict=True))] = part[rest]

    def array(self) -> jax.Array:
        """The array; the host memory is given up. Without a sharding it is uncommitted: `jit` may move it."""
        if not self.is_placed:
            return jnp.asarray(self.pieces.popitem()[1])
        arrays = [jax.device_put(self.pieces.pop(device), device) for device in list(self.pieces)]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def _with_prefix(tensors: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """Names of a bare network (GPT-2's published files) get the prefix of the whole one."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    known = {entry.theirs for entry in family.entries}
    return {name if name in known else family.prefix + name: stored for name, stored in tensors.items()}


def _check_names(directory, tensors: dict[str, Stored], family: Family, config: TransformerConfig, entries) -> None:
    expected = {}
    for entry, shapes in entries:
        shape = tuple(entry.layout.shape(shapes))
        expected.update((name, shape) for name, _ in _places(entry, config))
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(name for name in tensors.keys() - expected.keys() if not name.endswith(family.buffers or "\0"))
    extra = [name for name in extra if not _is_tied_copy(name, tensors, family, config)]
    wrong = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    problems = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in extra]
    problems += [f"{name} is {tensors[name].shape}, config.json says {expected[name]}" for name in wrong]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{directory}: {shown}. Nothing was loaded. Fix: config.json and weights must belong together")


def _is_tied_copy(name: str, tensors: dict[str, Stored], family: Family, config: TransformerConfig) -> bool:
    """True for an output matrix that some files store beside the equal embedding it is tied to."""
    matrix = {entry.theirs: entry.ours for entry in family.entries}.get(name)
    embedding = next(entry.theirs for entry in family.entries if entry.ours == ("embedding",))
    if matrix != ("unembedding",) or not config.tie_embeddings or embedding not in tensors:
        return False
    return tensors[name].shape == tensors[embedding].shape and np.array_equal(
        tensors[name].read(), tensors[embedding].read()
    )


def save(
    directory: Path | str,
    params: Params,
    hf_config: dict[str, Any],
    *,
    extra_files: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 4_000_000_000,
    ignore: Sequence[str] = (),
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; it appears whole or not at all.

    Args:
      directory: must not exist.
      params: a language model's, any shardings; stored in their own dtype.
      hf_config: from `load`, `llama_config`, or written by hand.
      extra_files: called with the folder before it gets its name, to add a tokenizer or a model card.
      max_shard_bytes: per weight file.
      ignore: as in `load`.

    Raises:
      FileExistsError: the folder is there.
      ValueError: the parameters are not those of `hf_config`.
    """
    _save(Path(directory), params, None, hf_config, extra_files, max_shard_bytes, ignore)


def save_reward_model(
    directory: Path | str,
    params: Params,
    hf_config: dict[str, Any],
    *,
    pad_token_id: int,
    extra_files: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 4_000_000_000,
    ignore: Sequence[str] = (),
) -> None:
    """Write a folder that `AutoModelForSequenceClassification.from_pretrained` loads, with one label; as `save`.

    Args:
      directory: must not exist.
      params: `{"trunk": ..., "head": ...}`, its score read at the last token.
      hf_config: of the trunk.
      pad_token_id: transformers takes the last token with another id for the last one.
      extra_files: as in `save`.
      max_shard_bytes: as in `save`.
      ignore: as in `load`.

    Raises:
      FileExistsError: the folder is there.
      ValueError: the parameters are not those of `hf_config`, or the head has a bias, for which the format has no place.
    """
    bias = float(params["head"]["bias"])
    if bias:
        raise ValueError(
            f"the head's bias is {bias:g}, and the format has no place for it. Fix: subtract it, set it to 0"
        )
    values = {**hf_config, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad_token_id}
    head = params["head"]["weight"].reshape(1, -1)
    _save(Path(directory), params["trunk"], head, values, extra_files, max_shard_bytes, ignore)


def _save(directory: Path, params: Params, head, hf_config: dict, extra_files, max_shard_bytes: int, ignore) -> None:
    if directory.exists():
        raise FileExistsError(
            f"{directory} is there already and is never overwritten; fix: another name, or move it away"
        )
    family, config = _family(hf_config, "hf_config"), transformer_config(hf_config, where="hf_config", ignore=ignore)
    if head is not None:  # a scorer has no output matrix of its own
        config = dataclasses.replace(config, tie_embeddings=True)
        params = {name: part for name, part in params.items() if name != "unembedding"}
    _check_params(params, config)
    dtype = params["embedding"].dtype
    name = family.causal if head is None else family.scoring
    values = {**hf_config, "architectures": [name], "dtype": dtype.name, "torch_dtype": dtype.name}
    part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        (part / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tensors = _tensors_of(params, head, family, config)
        write_tensors(part, tensors, max_shard_bytes=max_shard_bytes)
        if extra_files is not None:
            extra_files(part)
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_params(params: Params, config: TransformerConfig) -> None:
    expected = {keystr(path): spec.shape for path, spec in tree_leaves_with_path(param_specs(config), is_leaf=is_spec)}
    mine = {keystr(path): array.shape for path, array in tree_leaves_with_path(params)}
    wrong = sorted(name for name in expected.keys() | mine.keys() if expected.get(name) != mine.get(name))
    if wrong:
        shown = "; ".join(f"{name} is {mine.get(name)}, not {expected.get(name)}" for name in wrong[:10])
        raise ValueError(
            f"params are not those of hf_config: {shown}. Nothing was written. Fix: pass the right hf_config"
        )


def _tensors_of(params: Params, head, family: Family, config: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors, one at a time on the host."""
    own = params if head is None else {**params, "score": head.astype(params["embedding"].dtype)}
    for entry, _ in _entries(family, config, head=head is not None):
        tree = own["layers"] if "{layer}" in entry.theirs else own
        for name, index in _places(entry, config):
            yield name, entry.layout.join([np.asarray(jax.device_get(tree[ours][index])) for ours in entry.ours])
