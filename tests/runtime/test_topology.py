"""Machines that are not here: names, messages, and bytes against arithmetic of the test's own."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rl
from rlhf_jax.runtime.sharding import replicated
from rlhf_jax.runtime.topology import (
    CHIPS,
    GIB,
    abstract,
    device_bytes,
    device_flops,
    device_memory,
    program_memory,
    topology_devices,
    wanted_memory,
)


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:4", "v5e:0x4", "v9:2x2", "cpu:0", "cpu:two", "gpu:8"])
def test_unknown_topologies_are_told_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"no topology '{name}'; known: v4:2x2x1, .*; v5e:2x2, .*; cpu:N"):
        topology_devices(name)


def test_cpu_devices_that_are_not_there():
    assert topology_devices("cpu:2") == jax.devices("cpu")[:2]
    with pytest.raises(ValueError, match=r"cpu:8: this process has 2 CPU devices\. Fix: .*jax_num_cpu_devices', 8\)"):
        topology_devices("cpu:8")


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"v5e:2x2: .* pip install 'rlhf_jax\[tpu-compiler\]'"):
        topology_devices("v5e:2x2")


def test_chips_and_their_devices():
    assert device_memory("v4:2x2x1") == 30.75 * GIB
    assert device_memory("v5e:2x2") == 15.75 * GIB
    assert device_flops("v5p:2x2x1") == 459e12
    assert device_memory("cpu:2") is device_flops("cpu:2") is None
    sizes = {
        name: [np.prod([int(side) for side in size.split("x")]) for size in chip.slices] for name, chip in CHIPS.items()
    }
    assert all(found == sorted(found) for found in sizes.values())


def test_bytes_of_shapes_are_bytes_of_arrays():
    mesh = rl.make_mesh(data=1, fsdp=2)
    specs = {"w": rl.models.parameters.ParamSpec((6, 4), ("embed", "mlp"), 1.0)}
    shardings = {**rl.named_shardings(specs, mesh), "count": replicated(mesh), "key": replicated(mesh)}
    arrays = {"w": jnp.ones((6, 4), jnp.bfloat16), "count": jnp.zeros((), jnp.int32), "key": jax.random.key(0)}
    described = abstract(jax.eval_shape(lambda: arrays), shardings)
    assert device_bytes(described) == 3 * 4 * 2 + 4
    there = jax.device_put(
        {name: arrays[name] for name in ("w", "count")}, {name: shardings[name] for name in ("w", "count")}
    )
    assert device_bytes(described) == sum(x.addressable_shards[0].data.nbytes for x in there.values())
    step = jax.jit(lambda x: {**x, "w": x["w"] + x["count"].astype(jnp.bfloat16)}, donate_argnums=0)
    memory = program_memory(step.lower({name: described[name] for name in there}).compile())
    assert memory.arguments == 28
    assert memory.outputs < 28  # a table of pointers: what is donated is not counted again


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.51G of 15.75G hbm.", 20.51 * GIB),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.5M) exceeds",
            512.5 * 2**20,
        ),
        ("RESOURCE_EXHAUSTED: something else", None),
        ("INTERNAL: Used 20.51G of 15.75G hbm", None),
    ],
)
def test_what_a_compiler_wanted(message, wanted):
    assert wanted_memory(jax.errors.JaxRuntimeError(message)) == (wanted and int(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("family", CHIPS)
def test_a_chip_is_a_device_of_a_mesh(family):
    """Of the memory that its compiler names when it is asked for far too much."""
    pytest.importorskip("libtpu", reason="needs pip install 'rlhf_jax[tpu-compiler]'")
    name = f"{family}:{CHIPS[family].slices[0]}"
    mesh = rl.make_mesh(data=-1, devices=topology_devices(name))
    assert mesh.size == 4
    large = jax.ShapeDtypeStruct((400, 2**28), jnp.float32, sharding=replicated(mesh))
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x + 1).lower(large).compile()
    given = re.search(r"HBM \(([\d.]+)G\)", str(caught.value))
    assert float(given[1]) == pytest.approx(device_memory(name) / GIB, abs=0.01)


@pytest.mark.slow
def test_a_mesh_that_the_slice_cannot_give_is_refused():
    pytest.importorskip("libtpu", reason="needs pip install 'rlhf_jax[tpu-compiler]'")
    with pytest.raises(
        ValueError, match=r"'expert': 8, .* would split a side of the slice .* Fix: every size a product"
    ):
        rl.make_mesh(data=1, fsdp=-1, expert=8, devices=topology_devices("v5p:4x4x4"))
    assert rl.make_mesh(data=1, fsdp=-1, expert=16, devices=topology_devices("v5p:4x4x4")).shape["fsdp"] == 4
