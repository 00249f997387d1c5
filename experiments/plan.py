"""Will it fit? Compiles a stage's real step functions for a TPU slice that need not be here, and adds up the bytes.

    pip install 'rlhf_jax[tpu-compiler]'
    python experiments/plan.py --model 8B --topology v5e:8x8 --stage ppo
    python experiments/plan.py --model 8B --topology v5e --stage ppo --find        # the smallest slice on which it fits
    python experiments/plan.py --model DIRECTORY --topology cpu:8 --stage sft      # without the TPU's compiler

Memory is what the compiler reports for every program, with all that stays on the chips beside it: the state is donated, the
frozen models stay. A PPO iteration is compiled as its three parts, called one by one. Matrix products are counted from
shapes, loops as often as they run and attention as if every key were seen; XLA's own count takes loops once. Collectives are
those in the compiled text, where loops stand once too. Exit status 1: it does not fit. A large model takes minutes.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import jax
import tyro
from plan_models import network
from plan_programs import STAGES, Program, Setting, Stage
from plan_report import Part, Plan, changes, show

import rlhf_jax as rl
from rlhf_jax.models.attention import best_for, xla_attention
from rlhf_jax.models.experts import experts_on, routed_mlp
from rlhf_jax.runtime.flops import matmul_flops
from rlhf_jax.runtime.runs import write_json
from rlhf_jax.runtime.sharding import BATCH_AXES, constrain_on
from rlhf_jax.runtime.topology import (
    CHIPS,
    device_bytes,
    device_flops,
    device_memory,
    host_bytes,
    program_memory,
    topology_devices,
    wanted_memory,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to plan."""

    model: str = "8B"
    """A preset (1B, 8B, 70B, 30B-A3B, 8x7B), a `config.json`, or a folder with one."""
    topology: str = "v5e:8x8"
    """Of a v4, v5e, v5p or v6e, or `cpu:N`; the family alone with `find`."""
    stage: Literal["sft", "reward_model", "rollout", "ppo", "dpo"] = "ppo"
    find: bool = False
    """Try the family's slices from the smallest on, until one fits."""
    data: int = 1
    """Sizes of the mesh; one may be -1: what is left."""
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1
    batch: int = 256
    """Rows; prompts of a rollout, pairs of a reward model or of DPO."""
    prompt_length: int = 512
    completion_length: int = 512
    num_minibatches: int = 1
    """PPO's steps an iteration."""
    num_micro_batches: int = 1
    logits_columns: int | None = 128
    """Columns of a micro-batch whose logits a loss makes at a time (`logits_chunk`); none = all."""
    remat: bool = True
    """Layers are computed again in the backward pass."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What is computed in; what is trained is float32."""
    frozen_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of reference and reward model, and of a rollout alone."""
    shared_critic: bool = False
    """PPO's critic is a head on the policy."""
    offload: bool = False
    """PPO's reference and reward model wait in the hosts' memory; their layers come one at a time."""
    json: Path | None = None
    """File for the figures."""


def build(config: Config, devices: list[jax.Device], *, plain: bool = False) -> Stage:
    """The stage on a mesh of these devices; `plain` is the same in products that can be counted.

    Raises:
      ValueError: sizes that do not divide.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "expert": config.expert, "tensor": config.tensor}
    mesh, shape = rl.make_mesh(**sizes, devices=devices), network(config.model)
    axes = {"mesh": mesh, "rows": BATCH_AXES, "heads": "tensor"}
    attention_fn = best_for(devices[0], dtype=config.dtype, head_dim=shape.head_dim, **axes)
    steps = config.num_micro_batches * (config.num_minibatches if config.stage == "ppo" else 1)
    pairs = 2 if config.stage == "dpo" else 1
    chunk = None if config.logits_columns is None else config.logits_columns * pairs * config.batch // steps
    shape = dataclasses.replace(
        shape,
        dtype=config.dtype,
        remat=config.remat,
        logits_chunk=chunk,
        attention_fn=xla_attention if plain else attention_fn,
        experts_fn=routed_mlp if plain else experts_on(mesh),
        constrain_fn=constrain_on(mesh),
    )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch % (steps * parts):
        raise ValueError(
            f"{config.batch} rows do not divide into {steps} micro-batches on {parts} devices of data and fsdp. "
            f"Fix: --batch {-(-config.batch // (steps * parts)) * steps * parts}, or more of the devices in --tensor"
        )
    names = ("batch", "prompt_length", "completion_length", "num_minibatches", "num_micro_batches")
    options = {name: getattr(config, name) for name in (*names, "frozen_dtype", "shared_critic", "offload")}
    stage = STAGES[config.stage](Setting(shape, mesh, **options))
    return stage._replace(rows=config.batch // (steps * parts))


def compile_part(config: Config, program: Program, plain: Program, num_devices: int) -> Part:
    """One program, compiled."""
    start = time.monotonic()
    jitted = jax.jit(program.fn, donate_argnums=program.donated, out_shardings=program.outputs)
    memory, wanted, collectives = None, None, {}
    try:
        compiled = jitted.lower(*program.args).compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = wanted_memory(error)
        if wanted is None:
            raise
    else:
        memory, collectives = program_memory(compiled), rl.count_collectives(compiled)
    flops = matmul_flops(plain.fn, *plain.args, while_steps=config.completion_length - 1) / num_devices
    speed = device_flops(config.topology)
    return Part(
        program.name,
        memory,
        device_bytes(program.beside),
        wanted,
        flops,
        None if speed is None else flops / speed,
        collectives,
        time.monotonic() - start,
    )


def plan(config: Config) -> Plan:
    """Compile the stage's programs, the largest first; what cannot fit whatever they need is not compiled."""
    devices = topology_devices(config.topology)
    stage, plain = build(config, devices), build(config, devices, plain=True)
    held = {name: device_bytes(arrays) for name, arrays in stage.held.items()}
    capacity, parts = device_memory(config.topology), []
    waiting = sum(host_bytes(arrays) for arrays in stage.held.values())
    cache = device_bytes(stage.cache)
    result = Plan(config.topology, len(devices), capacity, held, waiting, cache, stage.rows, parts)
    for program, counted in zip(stage.programs, plain.programs, strict=True):
        if result.fits is False:
            break
        parts.append(compile_part(config, program, counted, len(devices)))
    return result


def find(config: Config) -> Plan | None:
    """The first slice of the family on which it fits."""
    family = config.topology.partition(":")[0]
    if family not in CHIPS:
        raise ValueError(f"--find knows the slices of {', '.join(CHIPS)}, not of {family!r}")
    for size in CHIPS[family].slices:
        here = dataclasses.replace(config, topology=f"{family}:{size}")
        try:
            result = plan(here)
        except ValueError as error:
            print(f"{here.topology}: {error}", flush=True)
            continue
        if result.fits:
            return result
        print(f"{here.topology}: {result.why}", flush=True)
    return None


def main(config: Config) -> None:
    """Plan, show, and leave with 1 where it does not fit."""
    family, _, size = config.topology.partition(":")
    jax.config.update("jax_platforms", "cpu")  # nothing runs, even where an accelerator is
    if family == "cpu" and size.isdigit():
        jax.config.update("jax_num_cpu_devices", int(size))
    result = find(config) if config.find else plan(config)
    if result is None:
        raise SystemExit(f"{config.model} {config.stage} fits on no {family} slice that is known here")
    show(config, result)
    if config.json is not None:
        write_json(config.json, {"config": dataclasses.asdict(config) | {"json": str(config.json)}, **result.figures()})
    for change in changes(config, result):
        print(f"- {change}")
    if result.fits is False:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
