"""Curves from rows of numbers as PNG. Needs matplotlib (extra `plots`)."""

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


def plot_lines(
    lines: Mapping[str, Sequence[Mapping[str, float]]],
    path: Path,
    *,
    x: tuple[str, str],
    y: Sequence[tuple[str, str]],
    title: str,
) -> None:
    """Several lines in common axes, one panel for every quantity on the y axis.

    Args:
      lines: label to rows. A row with `NAME_low` and `NAME_high` gets an interval; one without `NAME` is left out of
        that panel.
      path: of the PNG.
      x: (name in the rows, label with its unit).
      y: the same for each panel.
      title: above all panels.

    Raises:
      ValueError: a quantity that no row holds. Nothing was written.
    """
    from matplotlib.figure import Figure

    missing = [name for name, _ in y if not any(name in row for rows in lines.values() for row in rows)]
    if missing or not y:
        raise ValueError(f"no row holds {', '.join(missing) or 'anything that was asked for'}; nothing was plotted")
    figure = Figure(figsize=(4.6 * len(y), 3.6), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(y), squeeze=False).flat, y, strict=True):
        for line, rows in lines.items():
            rows = [row for row in rows if name in row]
            if not rows:
                continue
            xs, ys = ([row[key] for row in rows] for key in (x[0], name))
            ends = [(row.get(f"{name}_low", row[name]), row.get(f"{name}_high", row[name])) for row in rows]
            errors = [[v - low for v, (low, _) in zip(ys, ends, strict=True)]]
            errors += [[high - v for v, (_, high) in zip(ys, ends, strict=True)]]
            axis.errorbar(xs, ys, yerr=errors, label=line, marker="o", markersize=3, linewidth=1.2, elinewidth=0.8)
        axis.set_xlabel(x[1], fontsize=9)
        axis.set_title(label, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, format="png")
