"""A trace of a few steps of a training loop: which operation ran when, and for how long."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.runtime.resume import Kept


@contextlib.contextmanager
def profiled(kept: Kept, folder: Path, *, skip: int = 2, num_steps: int = 3) -> Iterator[Kept]:
    """`kept` as `resumable` yields it, which writes a trace of `num_steps` steps after the first `skip`, which compile.

    `folder` then holds, under `plugins/profile`, what XProf (TensorBoard) shows and a `perfetto_trace.json.gz` for
    ui.perfetto.dev; a step is there as `step N`, from its batch to its end. A loop that ends before is traced as far as it
    went. Tracing changes no number, and makes the steps slower.
    """
    first = kept.first_step + skip
    open_ones = contextlib.ExitStack()

    def batch(step: int, batch: Any) -> Any:
        if step == first:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
            open_ones.callback(jax.profiler.stop_trace)
        if first <= step < first + num_steps:
            of_step.enter_context(jax.profiler.TraceAnnotation(f"step {step}"))
        return kept.batch(step, batch)

    def finish(step: int, state: Any) -> None:
        if first <= step < first + num_steps:
            jax.block_until_ready(state)
            of_step.close()
        if step == first + num_steps - 1:
            open_ones.close()
        kept.finish(step, state)

    with open_ones, contextlib.ExitStack() as of_step:
        yield kept._replace(batch=batch, finish=finish)
