"""One accelerator and a Llama of 1.2 billion parameters in bfloat16: decoding, training, PPO; and many small runs at once.

    python benchmarks/accelerator.py --part decode

prints one JSON line. Each part is a process of its own:

- `decode`: 64 rows; the time of a new token after the first ones, and the share of this device's copy rate at which the
  weights and the keys and values so far are read.
- `train`: a step of supervised fine-tuning with Adam, float32 parameters; the share of this device's matrix product rate at
  which it does the multiplications that the model needs (recomputed logits are none of them).
- `ppo`: an iteration of `tasks.py`; `trl_ppo.py` does the same work.
- `runs`: `--runs` iterations of the `tiny` network of `work.py` under `vmap`, beside one alone.

`--shape tiny` tries it all on a CPU.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from roofline import Rates, machine, num_bytes, seconds
from tasks import measure, ppo, ppo_iteration, prompts
from work import LEARNING_RATE, MODELS, Sizes, Weights, random_weights, words

import rlhf_jax as rl
from rlhf_jax.models import attention
from rlhf_jax.models.architecture import LayerKind
from rlhf_jax.models.rope import Rope

SHAPES = {
    "1b": rl.TransformerConfig(
        vocab_size=128_256, num_layers=16, model_dim=2048, num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192,
        kinds=(LayerKind(rope=Rope(base=5e5)),), norm_eps=1e-5,
    ),
    "tiny": rl.TransformerConfig(vocab_size=1024, num_layers=2, model_dim=64, mlp_dim=128),
}  # fmt: skip
"""Llama 3.2 1B's (embedding and output matrix are one), and one to try the script with."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    part: Literal["decode", "train", "ppo", "runs"]
    shape: Literal["1b", "tiny"] = "1b"
    repeats: int = 5
    decode_rows: int = 64
    decode_prompt: int = 1024
    decode_new: int = 128
    train_rows: int = 8
    train_length: int = 2048
    logits_chunk: int = 4096
    """Of training and PPO."""
    unroll: int = 16
    """Layers in a row without a loop, there."""
    runs: int = 32
    runs_dtype: Literal["bfloat16", "float32"] = "bfloat16"


def network_of(config: Config, **changes: Any) -> rl.TransformerConfig:
    """In bfloat16, with this device's attention."""
    shape = SHAPES[config.shape]
    kernel = attention.best_for(jax.devices()[0], dtype="bfloat16", head_dim=shape.head_dim)
    return dataclasses.replace(shape, dtype="bfloat16", attention_fn=kernel, **changes)


def device_rates(config: Config) -> Rates:
    """Of bfloat16 products of 8192 rows, and of passes over 4 GiB."""
    tried = config.shape == "tiny"
    return machine(jnp.bfloat16, side=512 if tried else 8192, mebibytes=64 if tried else 4096)


def decode(config: Config) -> dict[str, Any]:
    """Seconds of a new token: those of a long sample less those of one token, by the same program."""
    network, rows, new = network_of(config), config.decode_rows, config.decode_new
    params = jax.jit(lambda key: _rounded(rl.transformer.init(key, network)))(jax.random.key(0))
    sample = jax.jit(
        partial(rl.generate, rl.causal_model(network), max_new_tokens=new, eos_id=None, pad_id=0),
    )
    asked, rates = prompts(network, rows, config.decode_prompt, 0), device_rates(config)

    def run(limit: int, i: int = 0) -> Any:
        return sample(params, asked, jax.random.key(i), row_limits=jnp.full((rows,), limit))

    compiling = seconds(lambda: run(new))
    whole, first = (
        statistics.median(seconds(partial(run, limit, i)) for i in range(config.repeats)) for limit in (new, 1)
    )
    step = (whole - first) / (new - 1)
    per_column = 2 * 2 * network.num_layers * rows * network.num_kv_heads * network.head_dim
    moved = num_bytes(params) + per_column * (config.decode_prompt + new / 2)
    return {
        "rows": rows,
        "prompt": config.decode_prompt,
        "new": new,
        "tokens_per_s": round(rows * new / whole, 1),
        "step_ms": round(1e3 * step, 3),
        "prefill_s": round(first, 4),
        "first_call_s": round(compiling, 1),
        "step_gbyte": round(moved / 1e9, 3),
        "gbytes": round(moved / step / 1e9, 1),
        **_of(rates),
        "fraction_of_copy_rate": round(moved / step / rates.bytes, 3),
    }


def train(config: Config) -> dict[str, Any]:
    """Seconds of a step, several in a row."""
    network = network_of(config, logits_chunk=config.logits_chunk, unroll=config.unroll)
    batch = (config.train_rows, config.train_length)
    optimizer = rl.adam_optimizer(LEARNING_RATE)
    step = jax.jit(rl.make_train_step(rl.sft(rl.causal_model(network)), optimizer), donate_argnums=0)
    state = jax.jit(lambda key: rl.init_train_state(rl.transformer.init(key, network), optimizer))(jax.random.key(0))
    mask = jnp.broadcast_to(jnp.arange(batch[1]) > 0, batch)
    data = rl.SequenceBatch(jnp.asarray(words(0, network.vocab_size, *batch)), jnp.ones(batch, jnp.int32), mask)
    rates = device_rates(config)

    def run(times: int) -> Any:
        nonlocal state
        for _ in range(times):
            state, metrics = step(state, data)
        return metrics

    compiling = seconds(lambda: run(1))
    taken = statistics.median(seconds(lambda: run(4)) for _ in range(config.repeats)) / 4
    flops = training_flops(network, *batch)
    return {
        "rows": batch[0],
        "length": batch[1],
        "tokens_per_s": round(batch[0] * batch[1] / taken, 1),
        "step_ms": round(1e3 * taken, 2),
        "first_call_s": round(compiling, 1),
        "step_tflop": round(flops / 1e12, 2),
        "tflops": round(flops / taken / 1e12, 1),
        **_of(rates),
        "fraction_of_product_rate": round(flops / taken / rates.flops, 3),
    }


def training_flops(network: rl.TransformerConfig, rows: int, length: int) -> float:
    """Forward and backward: 6 a weight and token, and `6 T^2` a head's dimension for attention to what came before."""
    shapes = jax.eval_shape(lambda: rl.transformer.init(jax.random.key(0), network))
    weights = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim > 1)  # a tied embedding is the output matrix
    attended = network.num_layers * network.num_heads * network.head_dim * rows * length**2
    return 6.0 * (weights * rows * length + attended)


def learning(config: Config) -> dict[str, Any]:
    """PPO on 32 episodes of 64 and 64 tokens, eight updates, as in `work.py`."""
    network = network_of(config, logits_chunk=config.logits_chunk, unroll=config.unroll)
    sizes, weights = Sizes(), random_weights(network)
    drawn = Weights(jax.jit(weights.policy), jax.jit(weights.scorer))
    return measure(ppo(network, sizes, drawn), 1, config.repeats, partial(device_rates, config))


def runs(config: Config) -> dict[str, Any]:
    """Seconds of an iteration of one run and of many, in turns."""
    network = MODELS["tiny"] if config.shape == "1b" else dataclasses.replace(MODELS["tiny"], num_layers=1, unroll=1)
    network = dataclasses.replace(network, dtype=config.runs_dtype, product_fn=jnp.einsum)
    sizes = Sizes() if config.shape == "1b" else Sizes(prompts=8, prompt=8, new=8)
    iteration, frozen, state = ppo_iteration(network, sizes, random_weights(network))
    batch = rl.PPOBatch(prompts(network, sizes.prompts, sizes.prompt, 0))
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.runs, *x.shape)), state)
    one_fn = jax.jit(iteration, donate_argnums=1)
    many_fn = jax.jit(jax.vmap(iteration, in_axes=(None, 0, None, 0)), donate_argnums=1)
    key = jax.random.key(0)

    def run_one() -> Any:
        nonlocal state
        state, metrics = one_fn(frozen, state, batch, key)
        return metrics

    def run_many() -> Any:
        nonlocal many
        many, metrics = many_fn(frozen, many, batch, jax.random.split(key, config.runs))
        return metrics

    first = [seconds(run_one), seconds(run_many)]
    pairs = [(seconds(run_one), seconds(run_many)) for _ in range(config.repeats)]
    one, together = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [many / one for one, many in pairs]
    return {
        "runs": config.runs,
        "dtype": config.runs_dtype,
        "one_s": round(one, 4),
        "together_s": round(together, 4),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        "first_calls_s": [round(x, 1) for x in first],
    }


def _rounded(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _of(rates: Rates) -> dict[str, float]:
    return {"machine_tflops": round(rates.flops / 1e12, 2), "machine_gbytes": round(rates.bytes / 1e9, 1)}


PARTS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "decode": decode,
    "train": train,
    "ppo": learning,
    "runs": runs,
}


def main(config: Config) -> None:
    """One part."""
    device = jax.devices()[0]
    found = PARTS[config.part](config)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    about = {"jax": jax.__version__, "device": device.device_kind, "date": time.strftime("%Y-%m-%d")}
    print(
        json.dumps({"part": config.part, "shape": config.shape, **found, "peak_gib": round(peak / 2**30, 2), **about})
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
