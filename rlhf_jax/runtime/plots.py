"""Curves from `metrics.jsonl` rows as PNG. Needs matplotlib (extra `plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_curves(rows: Sequence[Mapping], panels: Mapping[str, tuple[str, str]], path: Path, *, title: str) -> None:
    """One small panel a metric against its step.

    Args:
      rows: as `MetricLog` writes them.
      panels: metric name → (stage, label of the y axis with its unit).
      path: of the PNG.
      title: above all panels.

    Raises:
      ValueError: a metric that no row of its stage holds. Nothing was written.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, and a notebook keeps its backend

    curves, missing = [], []
    for name, (stage, label) in panels.items():
        points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
        curves.append((stage, label, points))
        if not points:
            missing.append(f"{name} ({stage})")
    if missing or not curves:
        logged = sorted({f"{name} ({row['stage']})" for row in rows for name in row if "/" in name})
        wanted = ", ".join(missing) or "no panel was asked for"
        raise ValueError(f"never logged: {wanted}; the rows hold {', '.join(logged)}")
    columns = min(3, len(curves))
    height = -(-len(curves) // columns)
    figure = Figure(figsize=(3.7 * columns, 2.6 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False)
    for axis, (stage, label, points) in zip(axes.flat, curves, strict=False):
        axis.plot(*zip(*points, strict=True), linewidth=1.3)
        axis.set_title(f"{stage}: {label}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, format="png")
