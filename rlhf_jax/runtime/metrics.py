"""Metrics on their way out: a JSON line a step (the truth), a live line on the terminal, and whatever else is plugged in."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_jax.runtime import faults
from rlhf_jax.runtime.processes import is_first
from rlhf_jax.runtime.runs import write_text

Sink = Callable[[int, Mapping[str, float]], None]
"""`sink(step, values)`: a TensorBoard writer, a tracker. What it raises is counted and told; the run goes on unchanged."""


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
    twice; the rows before it must all be there. Of several processes the first one writes and shows.
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
        sinks: Sequence[Sink] = (),
    ):
        """`show` maps metric names to the short labels of the live line; `every` is in seconds, without a terminal.

        Entering raises `ValueError` when the file is no log of this kind, or lacks steps below `first_step`.
        """
        self._path, self._stage, self._num_steps, self._show, self._every = path, stage, num_steps, show, every
        self._first_step = first_step
        self._console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160, quiet=not is_first())
        self._bar: Progress | None = None
        self._sinks = [_Sink(sink) for sink in sinks]

    def __enter__(self) -> "MetricLog":
        if is_first():
            _drop_rows(self._path, self._stage, self._first_step)
        self._file = (self._path if is_first() else Path(os.devnull)).open("ab", buffering=0)
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
        for sink in self._sinks:
            if sink.failures > 1:
                self._tell(
                    f"{sink.name} failed at {sink.failures} of {sink.calls} steps; {self._path.name} is complete"
                )

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
        self._append(step, json.dumps({**row, **values}) + "\n")
        self._display(step, values, rate, now)
        for sink in self._sinks:
            error = sink(step, values)
            if error is not None and sink.failures == 1:
                self._tell(f"{sink.name} failed at step {step}, {self._path.name} goes on ({error!r})")
        return values

    def _append(self, step: int, line: str) -> None:
        """Unbuffered: a row is with the operating system before anything that is built upon it."""
        left = memoryview(line.encode())
        try:
            faults.hit("log_write")
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            text = f"{self._path}: {self._stage} step {step} was not logged ({os.strerror(error.errno)}); checkpoints are kept"
            raise OSError(error.errno, f"{text}. Fix: free some space, then resume") from error

    def _tell(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

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


class _Sink:
    """Foreign code that may fail: the error is handed back instead of raised."""

    def __init__(self, sink: Sink):
        self._sink, self.name = sink, getattr(sink, "__name__", type(sink).__name__)
        self.calls = self.failures = 0
        self._error: BaseException | None = None

    def __call__(self, step: int, values: Mapping[str, float]) -> BaseException | None:
        self.calls += 1
        self._error = None
        with self:
            self._sink(step, dict(values))
        return self._error

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Every error ends here; an interrupt and an exit do not."""
        if not isinstance(error, Exception):
            return False
        self._error = error
        self.failures += 1
        return True


def _drop_rows(path: Path, stage: str, first_step: int) -> None:
    """Remove the stage's rows from `first_step` on, and a last line that a killed process left unfinished."""
    old = path.read_bytes().decode() if path.exists() else ""
    whole = old[: old.rfind("\n") + 1]
    kept, steps = [], []
    for number, line in enumerate(whole.splitlines(keepends=True), start=1):
        row = json.loads(line)
        if not {"stage", "step"} <= row.keys():
            raise ValueError(f"{path}:{number}: no row of a MetricLog, nothing was changed: log to another file")
        if row["stage"] != stage or row["step"] < first_step:
            kept.append(line)
            steps += [row["step"]] if row["stage"] == stage else []
    if steps != list(range(first_step)):
        missing = sorted(set(range(first_step)) - set(steps))
        what = f"lacks steps {_ranges(missing)}" if missing else f"holds steps twice or out of order: {steps}"
        raise ValueError(
            f"{path} {what} of {stage!r}, whose checkpoint is {first_step} steps old; nothing was changed. "
            "Fix: bring the file back, or start this stage again without its checkpoints"
        )
    new = "".join(kept)
    if new != old:
        write_text(path, new)


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 9] → "3-5, 9"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
