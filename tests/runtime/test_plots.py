"""Curves are written as PNG; a metric that was never logged is named."""

import pytest

from rlhf_jax.runtime.plots import plot_curves, plot_lines

ROWS = [{"stage": "ppo", "step": step, "objective/kl": step / 10, "objective/scores": 1.0} for step in range(5)]


@pytest.mark.parametrize("num_panels", [1, 4])
def test_a_png_is_written(tmp_path, num_panels):
    rows = [{**row, **{f"m/{i}": i for i in range(num_panels)}} for row in ROWS]
    path = tmp_path / "curves.png"
    plot_curves(rows, {f"m/{i}": ("ppo", "KL (nats)") for i in range(num_panels)}, path, title="Act 3")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


@pytest.mark.parametrize(("name", "stage"), [("objective/lk", "ppo"), ("objective/kl", "sft")])
def test_metrics_that_were_never_logged(tmp_path, name, stage):
    panels = {"objective/scores": ("ppo", "score"), name: (stage, "KL")}
    with pytest.raises(ValueError, match=rf"never logged: {name} \({stage}\); the rows hold objective/kl \(ppo\)"):
        plot_curves(ROWS, panels, tmp_path / "curves.png", title="Act 3")
    assert not (tmp_path / "curves.png").exists()


def test_lines_in_common_axes(tmp_path):
    path, lines = (
        tmp_path / "lines.png",
        {"a": [{"kl": 0.0, "score": 1.0}, {"kl": 1.0, "score": 2.0}], "b": [{"kl": 0.5}]},
    )
    lines["b"][0] |= {"score": 3.0, "score_low": 2.0, "score_high": 5.0, "gold": 1.0}
    plot_lines(lines, path, x=("kl", "KL (nats)"), y=[("score", "score"), ("gold", "true utility")], title="Frontier")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row holds glod; nothing was plotted"):
        plot_lines(
            lines, tmp_path / "none.png", x=("kl", "KL"), y=[("score", "score"), ("glod", "?")], title="Frontier"
        )
    assert not (tmp_path / "none.png").exists()
