"""The commands of `docs/launching.md`: flags that the scripts know, and processes that meet by them."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sft
import tyro
from meshes import MeshConfig

from rlhf_jax.runtime.processes import Processes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launching.md").read_text()
MEET = """
import os, sys, jax
from jax._src.clusters import cloud_tpu_cluster
from rlhf_jax.runtime.processes import Processes, joined, largest
jax.config.update("jax_num_cpu_devices", 2)
metadata = eval(sys.argv[2])
if metadata:
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where it finds no TPU
    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    cloud_tpu_cluster.get_metadata = lambda key: (metadata[key], 200)
with joined(sys.argv[1], Processes(distributed=True)):
    print("MET", jax.process_index(), jax.process_count(), jax.device_count(), largest(jax.process_index()))
"""


def commands(marker):
    """Every call of a script in the block under a marker, as arguments."""
    block = re.search(rf"<!-- {marker} -->\n```\n(.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(found.rstrip('"')) for found in re.findall(r"python experiments/sft\.py (.*)", block)]


def run_all(calls):
    """Outputs of processes that run at the same time; each a command and what its environment has besides."""
    path = f"{ROOT}:{ROOT / 'experiments'}"
    common = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen([sys.executable, *call], env={**common, **extra}, **options) for call, extra in calls]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), outputs
    return outputs


def free_port(ports=(0,)):
    """The first of these ports that nobody has; 0 = any."""
    for port in ports:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("localhost", port))
            return tried.getsockname()[1]
    raise OSError("no free port")


@pytest.mark.parametrize(("marker", "mesh"), [("slurm", MeshConfig(fsdp=8)), ("tpu", MeshConfig(fsdp=16))])
def test_a_cluster_needs_one_flag(marker, mesh):
    (arguments,) = commands(marker)
    config = tyro.cli(sft.Config, args=arguments)
    assert (config.processes, config.mesh) == (Processes(distributed=True), mesh)


def test_the_three_flags_differ_in_one():
    known = [tyro.cli(sft.Config, args=arguments).processes for arguments in commands("flags")]
    assert known == [Processes(False, "host0:1234", 2, i) for i in range(2)]


def test_processes_meet_under_slurm(tmp_path):
    """As JAX reads SLURM's variables: the port is of the job's number."""
    port = free_port(range(61440, 65536, 7))
    shared = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    own = [{**shared, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    outputs = run_all([(["-c", MEET, str(tmp_path), "None"], extra) for extra in own])
    assert all(f"MET {i} 2 4 1" in text for i, text in enumerate(outputs)), outputs


def test_processes_meet_on_tpu_vms(tmp_path):
    """As JAX reads what a TPU VM's metadata say of its slice; the devices stay CPUs."""
    told = {"worker-network-endpoints": "a:1:127.0.0.1,b:2:127.0.0.1", "tpu-env": ""}
    own = [repr({**told, "agent-worker-number": str(i)}) for i in range(2)]
    extra = {"JAX_COORDINATOR_PORT": str(free_port())}
    outputs = run_all([(["-c", MEET, str(tmp_path), metadata], extra) for metadata in own])
    assert all(f"MET {i} 2 4 1" in text for i, text in enumerate(outputs)), outputs


@pytest.mark.slow
def test_the_commands_of_the_page_train(tmp_path):
    """Two processes, one device each, on a small file: the policy is there, its log has every step once."""
    rows = [
        {"id": str(i), "prompt": [{"role": "user", "content": f"say {i}"}], "response": "it is so"} for i in range(64)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = (
        "--sft.num-layers 1 --sft.model-dim 16 --sft.num-heads 2 --sft.mlp-dim 16 --sft.batch-size 2 --vocab-size 280"
    )
    small += f" --data {tmp_path / 'mine.jsonl'} --mesh.fsdp 2"
    places = {"/shared/mine": str(tmp_path / "run"), "host0:1234": f"localhost:{free_port()}"}
    calls = [[places.get(word, word) for word in arguments] for arguments in commands("flags")]
    script = str(ROOT / "experiments" / "sft.py")
    outputs = run_all([([script, *call, *small.split()], {"XLA_FLAGS": ""}) for call in calls])
    assert "policy saved in" in outputs[0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) > 1
    assert steps == list(range(len(steps)))
