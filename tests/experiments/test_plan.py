"""Plans: published sizes, bytes against real arrays and a step compiled here, what is said where something does not fit."""

import dataclasses
import json

import jax
import plan
import plan_models
import plan_report
import pytest
from plan_report import Part, Plan

import rlhf_jax as rl
from rlhf_jax.models.parameters import is_spec, num_params
from rlhf_jax.runtime.sharding import constrain_on
from rlhf_jax.runtime.topology import GIB, Memory, device_bytes, host_bytes, topology_devices

SMALL = plan.Config(
    model="tiny",
    topology="cpu:2",
    stage="sft",
    batch=4,
    prompt_length=4,
    completion_length=4,
    num_micro_batches=2,
    logits_columns=4,
)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("1B", 1_235_814_400),  # meta-llama/Llama-3.2-1B
        ("8B", 8_030_261_248),  # meta-llama/Llama-3.1-8B
        ("70B", 70_553_706_496),  # meta-llama/Llama-3.1-70B
        ("30B-A3B", 30_532_122_624),  # Qwen/Qwen3-30B-A3B
        ("8x7B", 46_702_792_704),  # mistralai/Mixtral-8x7B-v0.1
    ],
)
def test_presets_have_the_published_sizes(model, published):
    specs = rl.transformer.param_specs(plan_models.network(model))
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32"), specs, is_leaf=is_spec)
    assert num_params(shapes) == published


def test_any_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(plan_models.PRESETS["tiny"]), "utf-8")
    expected = plan_models.network("tiny")
    assert plan_models.network(str(tmp_path)) == plan_models.network(str(tmp_path / "config.json")) == expected
    with pytest.raises(SystemExit, match=r"7B is no preset \(1B, 8B, .*\) and no config\.json; nothing was planned"):
        plan_models.network("7B")


def test_a_plan_tells_the_bytes_of_the_step_that_runs():
    """The step built here from real arrays, in the manner of a script, needs what was planned."""
    planned = plan.plan(SMALL)
    mesh = rl.make_mesh(data=1, fsdp=2)
    network = plan_models.network("tiny")
    network = dataclasses.replace(
        network, dtype="bfloat16", remat=True, logits_chunk=4 * 2, constrain_fn=constrain_on(mesh)
    )  # four columns of the two rows of a micro-batch
    optimizer, specs = rl.adam_optimizer(1e-5), rl.transformer.param_specs(network)

    def init(key):
        return rl.init_train_state(rl.transformer.init(key, network), optimizer)

    state = rl.init_sharded(init, jax.random.key(0), specs=specs, mesh=mesh)
    tokens = jax.numpy.ones((4, 8), "int32")
    batch = rl.shard_batch(rl.SequenceBatch(tokens, tokens, tokens > 0), mesh)
    step = rl.make_train_step(rl.sft(rl.causal_model(network)), optimizer, num_micro_batches=2)
    step = jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    memory = step.lower(state, batch).compile().memory_analysis()
    [part] = planned.parts
    assert part.memory.temporaries == memory.temp_size_in_bytes > 0
    assert part.memory.arguments == memory.argument_size_in_bytes
    here = {"parameters": state.params, "moments": state.opt_state}
    nbytes = {name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(here[name])) for name in here}
    assert planned.held == nbytes
    assert nbytes["parameters"] == 4 * num_params(state.params) // 2
    assert planned.fits is None
    assert planned.rows == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 6}, r"6 rows do not divide into 2 micro-batches on 2 devices .* Fix: --batch 8"),
        ({"fsdp": 4}, "needs 4 devices, there are 2"),
        (
            {"fsdp": 1, "tensor": -1, "model": "odd"},
            r"dimension \d \(kv_heads\) has size 1, which mesh axis tensor of 2",
        ),
        ({"topology": "v5e:3"}, "no topology 'v5e:3'; known: "),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_is_compiled(change, message, monkeypatch):
    monkeypatch.setitem(plan_models.PRESETS, "odd", {**plan_models.PRESETS["tiny"], "num_key_value_heads": 1})
    with pytest.raises(ValueError, match=message):
        plan.plan(dataclasses.replace(SMALL, **change))


PPO = dataclasses.replace(SMALL, stage="ppo", offload=True)


def test_frozen_layers_wait_on_the_host():
    """Bytes of the layers' matrices on each of two devices; the rest, and all that is trained, stays."""
    held = plan.build(PPO, jax.devices()).held
    network = plan_models.network("tiny")
    heads = (2 * network.num_heads + 2 * network.num_kv_heads) * network.head_dim
    matrices = network.num_layers * network.model_dim * (heads + 3 * network.mlp_dim)
    for name in ("reference", "reward model"):
        assert host_bytes(held[name]) == matrices * 2 // 2
        assert 0 < device_bytes(held[name]) < matrices
    assert not any(host_bytes(held[name]) for name in ("policy", "critic", "moments"))
    there = plan.build(dataclasses.replace(PPO, offload=False), jax.devices()).held["reference"]
    assert device_bytes(there) == device_bytes(held["reference"]) + host_bytes(held["reference"])


def planned(topology="v5e:4x4", num_devices=16, held=4.0, update=11.0, given_up=False):
    memory = None if given_up else Memory(int(2 * GIB), 0, int((update - 2) * GIB), 0, int(update * GIB))
    parts = [Part("update", memory, GIB, int(update * GIB) if given_up else None, 1e12, 0.1, {}, 1.0)]
    sizes = {
        "policy": held / 8,
        "critic": held / 8,
        "moments": held / 2,
        "reference": held / 8,
        "reward model": held / 8,
    }
    capacity = int(15.75 * GIB)
    return Plan(topology, num_devices, capacity, {k: int(v * GIB) for k, v in sizes.items()}, 0, GIB, 1, parts)


def test_what_fits_is_the_program_that_needs_most_with_what_stays_beside_it():
    assert planned().peak == 12 * GIB
    assert planned(update=14.7).fits
    assert not planned(update=14.8).fits
    assert not planned(held=16, update=1).fits
    assert planned(update=20, given_up=True).why == "update needs at least 21 GiB of 15.8"


def test_changes_are_proposed_where_it_does_not_fit(capsys):
    config = plan.Config(stage="ppo", topology="v5e:4x4", remat=False)
    assert plan_report.changes(config, planned()) == []
    tips = "\n".join(plan_report.changes(config, planned(update=20, given_up=True)))
    saved = ("--shared-critic saves 1.5 GiB", "--offload saves most of 1 GiB")
    for tip in ("--remat", "--tensor 2", *saved, "LoRA", "--topology v5e:4x8, 2 times"):
        assert tip in tips
    assert "--num-micro-batches 2" in "\n".join(
        plan_report.changes(config, dataclasses.replace(planned(update=20), rows=2))
    )
    plan_report.show(config, planned(update=20, given_up=True))
    assert "It does not fit: update needs at least 21 GiB of 15.8." in capsys.readouterr().out


def test_the_smallest_slice_is_found(monkeypatch, capsys):
    def fake(config):
        if config.topology.endswith(":2x2"):
            raise ValueError("256 rows do not divide")
        return planned(config.topology, update=11.0 if config.topology == "v5e:4x8" else 16.0)

    monkeypatch.setattr(plan, "plan", fake)
    assert plan.find(plan.Config(topology="v5e")).topology == "v5e:4x8"
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "v5e:2x2: 256 rows do not divide",
        *(f"v5e:{size}: update needs 17 GiB of 15.8" for size in ("2x4", "4x4")),
    ]
    with pytest.raises(ValueError, match="--find knows the slices of v4, v5e, v5p, v6e, not of 'cpu'"):
        plan.find(SMALL)


@pytest.fixture
def tpu_compiler():
    """What it makes is not kept: without a TPU it could not be read again."""
    pytest.importorskip("libtpu", reason="needs pip install 'rlhf_jax[tpu-compiler]'")
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "ppo"])
def test_the_compiler_for_tpus_takes_every_step(stage):
    size = {"batch": 8, "prompt_length": 128, "completion_length": 128, "num_micro_batches": 2}
    found = plan.plan(dataclasses.replace(SMALL, stage=stage, topology="v5e:2x2", tensor=2, **size))
    assert found.fits
    assert all(part.collectives and part.seconds > 0 for part in found.parts)


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_the_compiler_for_tpus_leaves_waiting_layers_on_the_host(monkeypatch):
    monkeypatch.setitem(plan_models.PRESETS, "deep", {**plan_models.PRESETS["tiny"], "num_hidden_layers": 24})
    size = {"batch": 8, "prompt_length": 128, "completion_length": 128, "num_micro_batches": 1}
    config = dataclasses.replace(PPO, model="deep", topology="v5e:2x2", **size)
    devices = topology_devices(config.topology)
    here, waiting = (plan.build(dataclasses.replace(config, offload=x), devices, plain=True) for x in (False, True))
    before, after = (plan.compile_part(config, x.programs[1], x.programs[1], 4).memory for x in (here, waiting))
    assert (
        before.arguments - after.arguments >= host_bytes(waiting.held) > 0
    )  # more: narrow heads fill whole tiles there
    assert after.total < before.total
