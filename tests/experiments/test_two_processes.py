"""The three scripts over two processes of four devices, and on a split mesh: the metrics of one with eight copies; and a kill
that costs nothing."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from experiments.small_act import ACTS, outcome

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("small_act.py")


def start(act, run, *options):
    root = SCRIPT.parents[2]
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": f"{root}:{root / 'experiments'}"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), act, str(run), *options],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_pair(act, run, *options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--devices", "4", *options]
    return [start(act, run, *flags, "--process-id", str(i)) for i in range(2)]


def finish(*processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All three acts by two processes, by one, and by one on a mesh that splits parameters."""
    folder = tmp_path_factory.mktemp("runs")
    for act in ACTS:
        finish(*start_pair(act, folder / "two"))
        finish(start(act, folder / "one", "--devices", "8"))
        finish(start(act, folder / "split", "--devices", "8", "--mesh", "fsdp=2", "tensor=2"))
    return folder


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("run", ["two", "split"])
def test_metrics_are_those_of_one_process_of_copies(runs, run, act):
    ours, theirs = (outcome(runs / name, act)[1] for name in (run, "one"))
    assert [row["step"] for row in ours] == list(range(len(theirs)))
    assert len(ours) >= 30
    for row, other in zip(ours, theirs, strict=True):
        numbers = [{k: v for k, v in one.items() if k != "stage"} for one in (row, other)]
        assert numbers[0].keys() == numbers[1].keys()
        np.testing.assert_allclose(*(list(one.values()) for one in numbers), rtol=1e-3, atol=1e-4)


def test_one_is_killed_and_both_go_on(runs, tmp_path):
    """In act 3, after its tenth iteration: the end is that of the undisturbed pair, byte for byte."""
    run = tmp_path / "run"
    for act in ACTS[:2]:
        finish(*start_pair(act, run))
    both = start_pair("ppo", run)
    while (run / "metrics.jsonl").read_text().count('"ppo"') < 11:
        assert both[0].poll() is None
        time.sleep(0.02)
    both[1].kill()
    out, _ = both[0].communicate(timeout=60)
    assert both[0].returncode not in (0, None)
    assert "process 0 of 2" in out
    assert "Fix: start the same command with --resume on every host" in out
    both[1].communicate()
    finish(*start_pair("ppo", run, "--resume"))
    assert outcome(run, "ppo") == outcome(runs / "two", "ppo")
