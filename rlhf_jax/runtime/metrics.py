"""Metrics on their way out: a JSON line a step (the truth), and a live line on the terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_jax.runtime.runs import write_text


def check_finite(metrics: Mapping[str, float], *, stage: str, step: int) -> None:
    """Stop before a bad update is built upon.

    Raises:
      FloatingPointError: a metric is not finite, or `grad/finite` says that a gradient was not (the train step has then
        left the parameters as they were).
    """
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    skipped = metrics.get("grad/finite", 1.0) < 1.0
    if skipped:
        bad.insert(0, "the gradient")
    if bad:
        effect = (
            "An update with such a gradient is not applied: the parameters are finite"
            if skipped
            else ("The update of this step was applied")
        )
        raise FloatingPointError(
            f"{stage} step {step}: not finite: {', '.join(bad)}. {effect}. This step was not logged. "
            "Look at its batch, or lower the learning rate"
        )


class MetricLog:
    """Appends to `metrics.jsonl` and shows progress: a bar on a terminal, a line every few seconds elsewhere.

    Rows are `{"stage", "step", "seconds", "tokens_per_second", <metrics>}`; seconds count from where this process took
    the stage up. A stage that is started again replaces its rows from `first_step` on, so that no step stands there
    twice.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        num_steps: int,
        *,
        show: Mapping[str, str],
        first_step: int = 0,
        every: float = 5.0,
    ):
        """`show` maps metric names to the short labels of the live line; `every` is in seconds, without a terminal."""
        self._path, self._stage, self._num_steps, self._show, self._every = path, stage, num_steps, show, every
        self._first_step = first_step
        self._console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160)
        self._bar: Progress | None = None

    def __enter__(self) -> "MetricLog":
        _drop_rows(self._path, self._stage, self._first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._start = self._shown = time.monotonic()
        self._tokens = 0
        if self._console.is_terminal:
            columns = (
                TextColumn(f"[bold]{self._stage:<12}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=self._num_steps, completed=self._first_step, line="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()

    def write(self, step: int, metrics: Mapping[str, jax.Array | float], *, tokens: int) -> dict[str, float]:
        """Log one finished step.

        Args:
          step: counts from 0.
          metrics: scalars, on device or not.
          tokens: how many tokens the step read or sampled.

        Returns:
          The metrics as floats.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        check_finite(values, stage=self._stage, step=step)
        now = time.monotonic()
        self._tokens += tokens
        rate = self._tokens / max(now - self._start, 1e-9)
        seconds = round(now - self._start, 3)
        row = {"stage": self._stage, "step": step, "seconds": seconds, "tokens_per_second": round(rate)}
        self._file.write(json.dumps({**row, **values}) + "\n")
        self._file.flush()
        self._display(step, values, rate, now)
        return values

    def _display(self, step: int, values: Mapping[str, float], rate: float, now: float) -> None:
        shown = [f"{label} {values[name]:.3g}" for name, label in self._show.items() if name in values]
        line = "  ".join([*shown, f"{rate:,.0f} tok/s"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, line=line)
        elif now - self._shown >= self._every or step + 1 == self._num_steps:
            self._shown = now
            done = step + 1 - self._first_step
            eta = (now - self._start) / done * (self._num_steps - step - 1)
            place = f"{self._stage:<12} {step + 1}/{self._num_steps}"
            self._console.print(f"{place}  {line}  ETA {eta:.0f} s", highlight=False, markup=False)


def _drop_rows(path: Path, stage: str, first_step: int) -> None:
    """Remove the stage's rows from `first_step` on, and a last line that a killed process left unfinished."""
    if not path.exists():
        return
    old = path.read_text(encoding="utf-8")
    whole = old[: old.rfind("\n") + 1]
    kept = []
    for number, line in enumerate(whole.splitlines(keepends=True), start=1):
        row = json.loads(line)
        if not {"stage", "step"} <= row.keys():
            raise ValueError(f"{path}:{number}: no row of a MetricLog, nothing was changed: log to another file")
        if row["stage"] != stage or row["step"] < first_step:
            kept.append(line)
    new = "".join(kept)
    if new != old:
        write_text(path, new)
