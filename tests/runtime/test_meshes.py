"""Every step function on meshes of eight devices makes the numbers of one; what each layout sends; nothing is ever whole.

`eight.py` does the work in a process of its own, once for all tests; the whole product of steps and meshes is slow.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("eight.py")
STEPS = ("sft", "reward_model", "rollout", "ppo", "iteration", "grpo", "dpo", "lora", "ensemble")
MESHES = ("data8", "fsdp8", "data2_fsdp2_tensor2", "data2_sequence2_tensor2", "data2_ring4", "data2_expert2_fsdp2")
PRODUCT = [f"{step}/{mesh}" for step in STEPS for mesh in MESHES]
CHOSEN = [
    *(f"sft/{mesh}" for mesh in MESHES),
    "rollout/data8",
    "rollout/data2_fsdp2_tensor2",
    "rollout/data2_sequence2_tensor2",
    "ppo/data2_sequence2_tensor2",
    "iteration/data2_fsdp2_tensor2",
    "reward_model/fsdp8",
    "grpo/fsdp8",
    "dpo/data2_fsdp2_tensor2",
    "lora/data2_fsdp2_tensor2",
    "ensemble/data2_fsdp2_tensor2",
]
SUM_OF_SCALARS = 64
"""Bytes that the sums of losses, weights and metrics may take."""


def play(out, names):
    """Run the script on the eight devices; its results."""
    root = SCRIPT.parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(root)}
    command = [sys.executable, str(SCRIPT), str(out), *names]
    done = subprocess.run(
        command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def once_for_all_workers(tmp_path_factory, names):
    """The first worker of the session to come here does the work, the others wait for its file."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"eight{len(names)}"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 600
        while not (folder / "out.json").exists():
            assert time.monotonic() < deadline, f"the worker that makes {folder} has failed"
            time.sleep(0.2)
        return json.loads((folder / "out.json").read_text())
    return play(folder / "out.json", names)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return once_for_all_workers(tmp_path_factory, CHOSEN)


@pytest.mark.xdist_group("eight")
@pytest.mark.parametrize("name", CHOSEN)
def test_the_numbers_are_those_of_one_device(results, name):
    """Gradients within 1e-5 of the leaf's largest; of a rollout the log-probs so, and the tokens exactly."""
    assert results[name]["error"] < 1e-5


@pytest.mark.slow
@pytest.mark.xdist_group("eight_product")
def test_the_whole_product_of_steps_and_meshes(tmp_path):
    results = play(tmp_path / "out.json", PRODUCT)
    errors = {name: results[name]["error"] for name in PRODUCT}
    assert len(errors) == 54
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


@pytest.mark.xdist_group("eight")
def test_copies_send_their_gradients_and_nothing_else(results):
    """One all-reduce for the layers' gradients, one for the rest, one for the sums of scalars."""
    sent = results["sft/data8"]["sent"]
    parameters = results["state"]["bytes_of_parameters"]
    assert list(sent) == ["all-reduce"]
    count, size = sent["all-reduce"]
    assert count <= 3
    in_layers = results["sft/data8"]["sent_in_loops"]["all-reduce"][1]
    assert parameters <= size - in_layers + 2 * in_layers <= parameters + SUM_OF_SCALARS


@pytest.mark.xdist_group("eight")
@pytest.mark.parametrize("step", ["sft", "reward_model", "grpo"])
def test_fsdp_gathers_weights_and_sums_gradients(results, step):
    """Weights are gathered layer by layer, forward and backward; no activation moves but the rows found in the embedding.

    XLA's CPU sums whole gradients and keeps its part, where a TPU's or GPU's compiler makes it a reduce-scatter.
    """
    sent, in_layers = results[f"{step}/fsdp8"]["sent"], results[f"{step}/fsdp8"]["sent_in_loops"]
    parameters = results["state"]["bytes_of_parameters"]
    assert set(sent) <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    assert set(in_layers) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert sent["all-gather"][1] <= 2 * parameters
    assert sent["all-reduce"][1] <= parameters + SUM_OF_SCALARS
    assert in_layers["all-gather"] == [18, 2 * results["state"]["bytes_of_layer"]]


@pytest.mark.xdist_group("eight")
def test_copies_decode_alone(results):
    """But for one bit a token: whether all rows have ended."""
    assert results["rollout/data8"]["sent"] == results["rollout/data8"]["sent_in_loops"] == {"all-reduce": [1, 1]}


@pytest.mark.xdist_group("eight")
def test_the_cache_is_split_by_rows_and_heads(results):
    """`[B, G, S, C]` of a layer with 16 rows, 2 heads, 8 columns, width 4."""
    assert results["rollout/data2_fsdp2_tensor2"]["caches"] == [[4, 1, 8, 4]]
    assert results["rollout/data8"]["caches"] == [[2, 2, 8, 4]]


@pytest.mark.xdist_group("eight")
def test_columns_gather_keys_and_values_and_experts_send_no_tokens(results):
    """Context parallel: the only large thing gathered is keys and values, forward and again backward."""
    in_layers = results["sft/data2_sequence2_tensor2"]["sent_in_loops"]
    assert set(in_layers) == {"all-gather", "all-reduce"}
    keys = 8 * 16 * 1 * 4 * 4  # rows, columns, heads, width, bytes on one device
    assert in_layers["all-gather"] == [4, 4 * keys]
    assert "all-to-all" not in results["sft/data2_expert2_fsdp2"]["sent_in_loops"]


@pytest.mark.xdist_group("eight")
def test_a_ring_gathers_no_keys(results):
    """A block of keys, values and segments a hop, forward and backward; there their gradients, which go home, too."""
    in_layers = results["sft/data2_ring4"]["sent_in_loops"]
    assert set(in_layers) == {"collective-permute", "all-reduce"}
    keys, segments = 8 * 4 * 2 * 4 * 4, 8 * 4 * 4  # rows, columns, heads, width, bytes on one device
    count, size = in_layers["collective-permute"]
    assert size == (2 + 4 + 2) * keys + 2 * segments
    assert count == 3 + 5 + 2


@pytest.mark.xdist_group("eight")
def test_a_state_is_never_whole(results):
    """Born on fsdp=8, trained, saved, restored on data=2 x fsdp=2 x tensor=2; the largest pieces are of that mesh."""
    state = results["state"]
    for what in ("born_as_declared", "born_exact", "steps_keep_shardings", "restored_exact", "restored_as_asked"):
        assert state[what], what
    assert state["largest_whole"] <= max(state["largest_parameter"] // 4, state["largest_batch"])


@pytest.mark.xdist_group("eight")
def test_files_are_read_tensor_by_tensor(results):
    """Beside the result: a tensor as it is in the file and as it is here, and what Python needs."""
    files = results["files"]
    assert files["exact"]
    assert files["as_asked"]
    assert files["largest_whole"] <= files["largest_parameter"] // 4
    assert files["peak_beside_result"] < 3 * files["largest_tensor"] < files["all_tensors"] / 4
