"""What a step computes and sends on 1, 2, 4 and 8 devices, from the compiled programs: no accelerator, no clock.

    python benchmarks/scaling.py

Strong: one batch of 16 rows, shared. Weak: 16 rows a device. Prints README's table, and what it takes to bring the
parameters from the layout of training to that of generation (bytes, and seconds of this CPU), and what a long row needs on
eight devices with and without a ring. Layers are unrolled, so that each collective counts as often as it runs; a ring's
hops are a loop, whose body counts once. Two CPU cores, about five minutes of CPU time, all of it compiling.
"""

import dataclasses
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import rlhf_jax as rl
from rlhf_jax.models.attention import xla_attention
from rlhf_jax.runtime.sharding import BATCH_AXES

CONFIG = rl.TransformerConfig(
    vocab_size=4096, num_layers=4, model_dim=256, num_heads=8, num_kv_heads=8, head_dim=32, mlp_dim=1024, unroll=4
)
ROWS, COLUMNS = 16, 128
LAYOUTS = {
    "data": lambda n: {"data": n},
    "fsdp": lambda n: {"data": 1, "fsdp": n},
    "tensor": lambda n: {"data": 1, "tensor": n},
    "sequence": lambda n: {"data": 1, "sequence": n},
}


def step_on(mesh, num_rows, num_columns=COLUMNS, **options):
    """The compiled SFT step, lowered from shapes alone."""
    config = dataclasses.replace(CONFIG, constrain_fn=rl.constrain_on(mesh), **options)
    optimizer = rl.adam_optimizer(1e-3)

    def start():
        return rl.init_train_state(rl.transformer.init(jax.random.key(0), config), optimizer)

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = jax.eval_shape(start)
    state = jax.tree.map(placed, shapes, rl.state_shardings(shapes, rl.transformer.param_specs(config), mesh))
    split = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))
    dtypes = (jnp.int32, jnp.int32, jnp.bool_)
    batch = rl.SequenceBatch(
        *(jax.ShapeDtypeStruct((num_rows, num_columns), dtype, sharding=split) for dtype in dtypes)
    )
    step = jax.jit(rl.make_train_step(rl.sft(rl.causal_model(config)), optimizer), donate_argnums=0)
    return step.lower(state, batch).compile()


def sent(compiled):
    """Megabytes of the arrays in its collectives."""
    return sum(traffic.bytes for traffic in rl.count_collectives(compiled).values()) / 1e6


def table():
    """GFLOP and megabytes of one device, a row a layout."""
    counts = (1, 2, 4, 8)
    heads = [f"{kind}: {what}" for kind in ("strong", "weak") for what in ("GFLOP", "MB")]
    print(f"| layout of {', '.join(map(str, counts))} | {' | '.join(heads)} |\n|{'---|' * 5}", flush=True)
    for name, sizes in LAYOUTS.items():
        columns = []
        for rows_of in (lambda n: ROWS, lambda n: ROWS * n):
            meshes = [(n, rl.make_mesh(**sizes(n), devices=jax.devices()[:n])) for n in counts]
            steps = [step_on(mesh, rows_of(n)) for n, mesh in meshes]
            columns.append(", ".join(f"{step.cost_analysis()['flops'] / 1e9:.1f}" for step in steps))
            columns.append(", ".join(f"{sent(step):.0f}" for step in steps))
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


def long_rows():
    """One row over eight devices, layers recomputed: temporaries of each."""
    mesh = rl.make_mesh(data=1, sequence=8)
    for length in (4096, 16384):
        steps = [
            step_on(mesh, 1, length, remat=True, attention_fn=x) for x in (xla_attention, rl.ring_attention_on(mesh))
        ]
        sizes = (step.memory_analysis().temp_size_in_bytes / 1e6 for step in steps)
        print("{} columns: {:.0f} MB of temporaries with keys gathered, {:.0f} in a ring".format(length, *sizes))


def move():
    """From fsdp=8 to tensor=8 on the same devices."""
    training, generation = (rl.make_mesh(data=1, **sizes) for sizes in ({"fsdp": 8}, {"tensor": 8}))
    specs = rl.transformer.param_specs(CONFIG)
    params = rl.init_sharded(lambda: rl.transformer.init(jax.random.key(0), CONFIG), specs=specs, mesh=training)
    shardings = rl.named_shardings(specs, generation)
    program = jax.jit(lambda tree: tree, out_shardings=shardings).lower(params).compile()
    jax.block_until_ready(rl.reshard(params, shardings))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(rl.reshard(params, shardings))
        seconds.append(time.perf_counter() - begin)
    size = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6
    kinds = ", ".join(f"{traffic.count} {kind}" for kind, traffic in rl.count_collectives(program).items())
    print(
        f"\n{size:.1f} MB of parameters from fsdp=8 to tensor=8: {sent(program):.1f} MB in {kinds}; {np.median(seconds):.3f} s"
    )


if __name__ == "__main__":
    table()
    move()
    long_rows()
