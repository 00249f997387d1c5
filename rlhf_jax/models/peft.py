"""LoRA adapters in the folders of PEFT: `adapter_config.json` and `adapter_model.safetensors`, in and out.

    save_adapter("out", adapter, hf_config, rank=16, alpha=32)       # PeftModel.from_pretrained(torch_model, "out")
    adapter, scale = load_adapter("out", hf_config)                  # whatever save_pretrained of PEFT wrote

PEFT stores for a module with weight `[out, in]` the factors `lora_A [r, in]` and `lora_B [out, r]`; the names of the
modules come from `models.families`. Some families keep several of our matrices in one module (`qkv_proj`, `c_attn`,
`query_key_value`). Loaded, each of ours gets the module's A and its own rows of B. Saved, A holds the different A's of
ours one below the other and B is 0 where they do not meet: the same product, of a rank that is larger by their number.

Adapters of expert matrices stay here (`runtime.checkpoint` saves them): in PEFT's folders neither their names nor their
layout are settled, which depend on whether transformers fuses the experts and on the order of `target_parameters`. Both
ways are refused; attention and dense matrices of a network with experts are as those of any other.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rlhf_jax.models import layouts
from rlhf_jax.models.architecture import TransformerConfig, param_specs
from rlhf_jax.models.families import FAMILIES, Entry
from rlhf_jax.models.huggingface import transformer_config
from rlhf_jax.models.layouts import Shape
from rlhf_jax.models.lora import MATRICES, lora_specs, matrices, split_dims
from rlhf_jax.models.parameters import is_spec
from rlhf_jax.models.tensor_files import Stored, read_header, read_object
from rlhf_jax.types import Params

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights"})
HARMLESS = frozenset(
    {
        "alpha", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "lora_dropout", "lora_ga_config",
        "loftq_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
    }
)  # fmt: skip
"""Fields that say how an adapter was made or is found, or that another field, which is read, switches on."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is."""


class Adapter(NamedTuple):
    """A loaded adapter."""

    adapter: Params
    scale: float


class _Module(NamedTuple):
    """One adapted module of theirs, in all layers."""

    name: str
    """With `{layer}`."""
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Of our matrices in one layer."""
    per_head: bool
    transposed: bool
    """Stores its weight `[in, out]`."""

    @property
    def tail(self) -> str:
        """The name inside a layer."""
        return self.name.split("{layer}.")[1]

    def split_b(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Our B's `[r, out...]` from theirs `[out, r]`."""
        return self._layout().split(tensor, self._b_shapes(tensor.shape[-1]))

    def join_b(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Their B from ours."""
        return self._layout().join(arrays)

    def b_shape(self, rank: int) -> Shape:
        """Of their B."""
        return tuple(self._layout().shape(self._b_shapes(rank)))

    def a_layout(self) -> layouts.Layout:
        """Their A `[r, in]` is a linear layer, ours is `[in..., r]`."""
        return layouts.linear(MATRICES[self.ours[0]][0])

    def _layout(self) -> layouts.Layout:
        return layouts.per_head if self.per_head else layouts.linear()

    def _b_shapes(self, rank: int) -> list[Shape]:
        return [(rank, *split_dims(name, shape)[2]) for name, shape in zip(self.ours, self.shapes, strict=True)]


def _modules(config: TransformerConfig, hf_config: dict[str, Any]) -> list[_Module]:
    """The modules of this network that can have an adapter; experts have none that all versions of PEFT agree on."""
    layers, known = param_specs(config)["layers"], matrices(config)
    modules = []
    for entry in FAMILIES[hf_config["model_type"]].entries:
        if "{layer}" not in entry.theirs or "{expert}" in entry.theirs or any(name not in known for name in entry.ours):
            continue
        shapes = tuple(layers[name].shape[1:] for name in entry.ours)
        name, per_head = entry.theirs.removesuffix(".weight"), entry.layout is layouts.per_head
        modules.append(_Module(name, entry.ours, shapes, per_head, _is_transposed(entry)))
    return modules


def _is_transposed(entry: Entry) -> bool:
    """Asks the layout for the shape of matrices with 7 inputs and 1 output."""
    num_inputs, num_outputs = MATRICES[entry.ours[0]]
    return entry.layout.shape([(7, *(1,) * (num_inputs + num_outputs - 1))] * len(entry.ours))[0] == 7


def save_adapter(
    directory: Path | str,
    adapter: Params,
    hf_config: dict[str, Any],
    *,
    rank: int,
    alpha: float,
    base_model_name: str = "",
    ignore: Sequence[str] = (),
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(torch_model, directory)` loads; it appears whole or not at all.

    Where matrices with different A's share a module, the file's `r` is larger than `rank`, all else is filled up with
    zeros, and `lora_alpha` grows in proportion, so that the scale stays.

    Args:
      directory: must not exist.
      adapter: from `lora.init_lora`, or loaded; any shardings; stored in its own dtype.
      hf_config: the `config.json` of the base.
      rank: of the adapter.
      alpha: `scale * rank` of the scale that the adapter was trained with.
      base_model_name: where others find the base.
      ignore: as in `huggingface.load`.

    Raises:
      FileExistsError: the folder is there.
      ValueError: the adapter is not one of `hf_config` with this rank, or of experts.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} is there already and is never overwritten; fix: another name, or move it")
    config = transformer_config(hf_config, where="hf_config", ignore=ignore)
    modules = _modules(config, hf_config)
    _check_adapter(adapter, config, modules, rank)
    used = [module for module in modules if any(name in adapter for name in module.ours)]
    host = jax.tree.map(np.asarray, jax.device_get(adapter))
    parts = [_different(host, module) for module in used]
    file_rank = rank * max(len(different) for different, _ in parts)
    tensors = {}
    for module, (different, index) in zip(used, parts, strict=True):
        for layer in range(config.num_layers):
            a, b = _factors(host, module, different, index, layer, file_rank)
            name = PREFIX + module.name.format(layer=layer)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    values = _config_values(used, modules, file_rank, alpha * file_rank / rank, base_model_name)
    part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        (part / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, part / TENSORS, metadata={"format": "pt"})
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_adapter(adapter: Params, config: TransformerConfig, modules: list[_Module], rank: int) -> None:
    places = {name for module in modules for name in module.ours}
    homeless = [name for name in adapter if name in matrices(config) and name not in places]
    if homeless:
        raise ValueError(
            f"adapter of {homeless}: PEFT has no common format for experts. Nothing was written. Fix: `lora.merge` and save "
            "the whole model, or adapt the attention alone"
        )
    specs = lora_specs(config, rank=rank, targets=tuple(adapter))
    expected = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=is_spec)
    shapes = jax.tree.map(lambda array: array.shape, adapter)
    if shapes != expected:
        raise ValueError(
            f"not an adapter of rank {rank} of hf_config: {shapes} instead of {expected}. Nothing was written"
        )


def _different(adapter: Params, module: _Module) -> tuple[list[np.ndarray], dict[str, int]]:
    """The different A's of a module's matrices, and which of them each matrix has."""
    different: list[np.ndarray] = []
    index = {}
    for name in module.ours:
        if name in adapter:
            a = adapter[name]["a"]
            equal = [i for i, other in enumerate(different) if np.array_equal(a, other)]
            index[name] = equal[0] if equal else len(different)
            different.extend([] if equal else [a])
    return different, index


def _factors(adapter, module: _Module, different, index, layer: int, file_rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Their A `[file_rank, in]` and B `[out, file_rank]` of one layer."""
    rows = np.concatenate([module.a_layout().join([a[layer]]) for a in different])
    first = adapter[next(iter(index))]["b"]
    rank, arrays = first.shape[1], []
    for name, shape in zip(module.ours, module.shapes, strict=True):
        array = np.zeros((file_rank, *split_dims(name, shape)[2]), first.dtype)
        if name in index:
            array[index[name] * rank : (index[name] + 1) * rank] = adapter[name]["b"][layer]
        arrays.append(array)
    a = np.pad(rows, ((0, file_rank - len(rows)), (0, 0)))
    return np.ascontiguousarray(a), np.ascontiguousarray(module.join_b(arrays))


def _config_values(used: list[_Module], modules: list[_Module], rank: int, alpha: float, base: str) -> dict[str, Any]:
    tails, names = [module.tail for module in used], []
    for tail in tails:
        last = tail.split(".")[-1]
        alike = [module.tail for module in modules if module.tail.split(".")[-1] == last]
        names.append(last if all(other in tails for other in alike) else tail)
    return {
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": all(module.transposed for module in used),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else float(alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(set(names)),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def load_adapter(
    directory: Path | str, hf_config: dict[str, Any], *, dtype: Any = jnp.float32, ignore: Sequence[str] = ()
) -> Adapter:
    """An adapter that PEFT's `save_pretrained` wrote, and its scale: `lora_alpha / r`, or `/ sqrt(r)` with `use_rslora`.

    Args:
      directory: of `adapter_config.json` and `adapter_model.safetensors`.
      hf_config: the `config.json` of the base, as `huggingface.load` gives it.
      dtype: of the adapter.
      ignore: fields of `hf_config` that you know to be harmless.

    Raises:
      FileNotFoundError: no such files; a pickle is named, never opened.
      ValueError: anything but plain LoRA on the same matrices of all layers, a field that nobody reads, and tensors that
        are missing, unknown or misshapen; nothing is half-loaded.
    """
    directory = Path(directory)
    config = transformer_config(hf_config, where="hf_config", ignore=ignore)
    values = _read_config(directory / CONFIG)
    if not (directory / TENSORS).is_file():
        pickled = f"; {PICKLE} is a pickle, which can run code and is not opened" * (directory / PICKLE).is_file()
        raise FileNotFoundError(
            f"{directory}: no {TENSORS}{pickled}. Fix: save_pretrained(..., safe_serialization=True)"
        )
    tensors = read_header(directory / TENSORS)
    modules = _check_tensors(directory, tensors, _modules(config, hf_config), values, config.num_layers)
    adapter: dict[str, Any] = {}
    for module in modules:
        layers = [_read_layer(tensors, module, PREFIX + module.name.format(layer=i)) for i in range(config.num_layers)]
        for position, name in enumerate(module.ours):
            pairs = [layer[position] for layer in layers]
            adapter[name] = {
                part: jnp.asarray(np.stack([pair[i] for pair in pairs]), dtype) for i, part in enumerate(("a", "b"))
            }
    rank = values["r"]
    return Adapter(adapter, values["lora_alpha"] / (rank**0.5 if values.get("use_rslora") else rank))


def _read_layer(tensors: dict[str, Stored], module: _Module, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """A and B of each of our matrices in one layer."""
    a, b = tensors[f"{name}.lora_A.weight"].read(), tensors[f"{name}.lora_B.weight"].read()
    inputs = split_dims(module.ours[0], module.shapes[0])[1]
    (our_a,) = module.a_layout().split(a, [(*inputs, a.shape[0])])
    return [(our_a, our_b) for our_b in module.split_b(b)]


def _read_config(path: Path) -> dict[str, Any]:
    values = read_object(path, missing="give a folder that PEFT's save_pretrained wrote")
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: not the config of a LoRA adapter (peft_type). Nothing was loaded")
    problems = [f"{name} = {values[name]!r}" for name in sorted(values) if values[name] and name not in READ | HARMLESS]
    if values.get("bias", "none") != "none":
        problems.append(f"bias = {values['bias']!r}")
    if values.get("init_lora_weights", True) not in PLAIN_STARTS:
        problems.append(f"init_lora_weights = {values['init_lora_weights']!r} (which changes the base)")
    if problems:
        raise ValueError(
            f"{path}: only plain LoRA, the same on all layers, is read; found {', '.join(problems)}. Nothing was loaded. "
            "Fix: in PEFT, merge_and_unload() and save the whole model, or train without them"
        )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(f"{path}: r = {rank!r}, lora_alpha = {alpha!r}; a whole and a number are needed")
    return values


def _check_tensors(directory, tensors: dict[str, Stored], modules: list[_Module], values, num_layers: int):
    """The modules that are adapted; raises `ValueError` unless the tensors are theirs, in all layers, and no others."""
    targets = values.get("target_modules") or ()
    listed = () if isinstance(targets, str) or values.get("exclude_modules") else targets
    used, expected = [], {}
    for module in modules:
        prefixes = [PREFIX + module.name.format(layer=layer) for layer in range(num_layers)]
        named = any(f".{module.name}".endswith(f".{target}") for target in listed)
        if not (named or any(f"{prefix}.lora_A.weight" in tensors for prefix in prefixes)):
            continue
        used.append(module)
        rank, size = values["r"], module.a_layout().shape([(*split_dims(module.ours[0], module.shapes[0])[1], 1)])[1]
        expected.update({f"{prefix}.lora_A.weight": (rank, size) for prefix in prefixes})
        expected.update({f"{prefix}.lora_B.weight": module.b_shape(rank) for prefix in prefixes})
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unknown {name}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems or not used:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(
            f"{directory / TENSORS}: {shown or 'no adapter'}. Nothing was loaded. What can be adapted here: "
            f"{', '.join(module.tail for module in modules)}, in all {num_layers} layers. Fix: give the base it was made for"
        )
    return used
