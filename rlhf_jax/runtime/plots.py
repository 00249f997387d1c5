"""Curves from `metrics.jsonl` rows as PNG. Needs matplotlib (extra `plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_curves(rows: Sequence[Mapping], panels: Mapping[str, tuple[str, str]], path: Path, *, title: str) -> None:
    """One small panel a metric against its step.

    Args:
      rows: as `MetricLog` writes them.
      panels: metric name → (stage, label of the y axis with its unit). Metrics that no row holds are left out.
      path: of the PNG.
      title: above all panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = []
    for name, (stage, label) in panels.items():
        points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
        if points:
            curves.append((stage, label, points))
    if not curves:
        raise ValueError(f"none of the metrics {sorted(panels)} was logged")
    columns = 3
    height = -(-len(curves) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(11, 2.6 * height), squeeze=False, layout="constrained")
    for axis, (stage, label, points) in zip(axes.flat, curves, strict=False):
        axis.plot(*zip(*points, strict=True), linewidth=1.3)
        axis.set_title(f"{stage}: {label}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
