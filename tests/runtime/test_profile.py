"""The trace of a loop: three steps, past the first ones, and the same numbers."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.runtime.profile import profiled
from rlhf_jax.runtime.resume import guarded, resumable


@jax.jit
def trained_matrix_step(state, batch):
    return guarded(lambda state, batch: ({"w": state["w"] @ state["w"]}, {"loss": batch["x"].sum()}))(state, batch)


def run(folder, num_steps):
    start = {"w": jnp.eye(8)}
    with resumable(folder, "sft", start, save_every=5) as kept, profiled(kept, folder / "profile") as kept:
        state = kept.state
        for step in range(kept.first_step, num_steps):
            batch = kept.batch(step, {"x": np.ones(2, np.float32)})
            state, metrics = trained_matrix_step(state, batch)
            kept.check(step, state, metrics, batch)
            kept.finish(step, state)
    return state


def events(folder):
    (path,) = folder.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    return [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if "name" in event]


def test_three_steps_past_compiling_are_traced(tmp_path):
    run(tmp_path, 7)
    names = events(tmp_path)
    assert sorted({name for name in names if name.startswith("step ")}) == ["step 2", "step 3", "step 4"]
    assert sum("trained_matrix_step" in name for name in names) >= 3


def test_a_loop_that_ends_early_leaves_what_it_did(tmp_path):
    run(tmp_path, 3)
    assert {name for name in events(tmp_path) if name.startswith("step ")} == {"step 2"}
    run(tmp_path / "short", 2)
    assert not (tmp_path / "short" / "profile").exists()
