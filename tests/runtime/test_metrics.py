"""Metrics: complete rows, no step twice, a stop at the first number that is none."""

import io
import sys

import jax.numpy as jnp
import pytest

from rlhf_jax.runtime.faults import injected
from rlhf_jax.runtime.metrics import MetricLog, check_finite
from rlhf_jax.runtime.runs import read_json_lines, write_json_lines

SHOW = {"objective/scores": "score", "objective/kl": "KL"}


def log_steps(path, stage, steps, *, num_steps=4, first_step=0, kl=0.5):
    with MetricLog(path, stage, num_steps, show=SHOW, first_step=first_step) as log:
        return [log.write(step, {"objective/kl": jnp.float32(kl), "loss": 1.25}, tokens=10) for step in steps]


def test_rows_are_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    returned = log_steps(path, "ppo", range(3))
    assert returned == [{"objective/kl": 0.5, "loss": 1.25}] * 3
    rows = list(read_json_lines(path))
    names = ["stage", "step", "seconds", "tokens_per_second", "loss", "objective/kl"]
    assert [list(row) for row in rows] == [names] * 3
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["stage"] == "ppo" and row["seconds"] >= 0 and row["tokens_per_second"] > 0 for row in rows)


def steps_of(path):
    return [(row["stage"], row["step"], row["objective/kl"]) for row in read_json_lines(path)]


def test_a_stage_started_again_replaces_its_rows(tmp_path):
    """Killed in the middle of a line, then resumed: no step twice, none missing, other stages untouched."""
    path = tmp_path / "metrics.jsonl"
    log_steps(path, "sft", range(2))
    log_steps(path, "ppo", range(3))
    with path.open("a") as file:
        file.write('{"stage": "ppo", "st')
    before = path.read_text().splitlines()[:2]
    log_steps(path, "ppo", range(2), kl=0.75)
    assert path.read_text().splitlines()[:2] == before
    assert steps_of(path) == [("sft", 0, 0.5), ("sft", 1, 0.5), ("ppo", 0, 0.75), ("ppo", 1, 0.75)]
    log_steps(path, "ppo", [1, 2], first_step=1, kl=0.25)
    assert steps_of(path)[2:] == [("ppo", 0, 0.75), ("ppo", 1, 0.25), ("ppo", 2, 0.25)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": float("nan"), "kl": 1.0}, "ppo step 7: not finite: loss. The update of this step was applied"),
        ({"grad/finite": 0.0, "kl": 1.0}, "ppo step 7: not finite: the gradient. An update with such"),
        ({"grad/finite": 0.75, "grad/norm": float("inf")}, "not finite: the gradient, grad/norm."),
    ],
)
def test_a_number_that_is_none_stops_the_run(metrics, message):
    with pytest.raises(FloatingPointError, match=message):
        check_finite(metrics, stage="ppo", step=7)
    check_finite({"loss": 1.0, "grad/finite": 1.0}, stage="ppo", step=7)


def test_the_bad_step_is_not_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log_steps(path, "ppo", range(2))
    with pytest.raises(FloatingPointError, match="ppo step 2: not finite: objective/kl"):
        log_steps(path, "ppo", [2], first_step=2, kl=float("inf"))
    assert [row["step"] for row in read_json_lines(path)] == [0, 1]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with MetricLog(tmp_path / "m.jsonl", "ppo", 3, show=SHOW, every=0.0) as log:
        for step in range(3):
            log.write(step, {"objective/kl": 0.5, "objective/scores": -1.0}, tokens=1000)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 3
    assert lines[2].startswith("ppo          3/3  score -1  KL 0.5  ")
    assert "tok/s  ETA 0 s" in lines[2]
    log_steps(tmp_path / "m.jsonl", "ppo", range(4))  # every five seconds, and the last
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["4/4"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    log_steps(tmp_path / "m.jsonl", "ppo", range(4))
    assert "4/4" in sys.stderr.getvalue()
    assert "KL 0.5" in sys.stderr.getvalue()


def test_rows_that_are_no_log_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, [{"step": 1}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: no row of a MetricLog"):
        log_steps(path, "ppo", range(1))


def test_cut_at_any_byte_the_rows_are_whole_again(tmp_path):
    """A kill may leave any prefix; the checkpoint tells the step to go on with, and every step below it was logged."""
    path = tmp_path / "metrics.jsonl"
    log_steps(path, "sft", range(1))
    log_steps(path, "pò", range(2))
    written = path.read_bytes()
    for cut in range(len(written) + 1):
        whole = written[:cut].count(b"\n")
        for first_step in range(max(whole - 1, 0) + 1):
            path.write_bytes(written[:cut])
            log_steps(path, "pò", range(first_step, 2), first_step=first_step, kl=0.75)
            sft = [("sft", 0, 0.5)] * (whole > 0)
            old = [("pò", step, 0.5) for step in range(first_step)]
            assert steps_of(path) == sft + old + [("pò", step, 0.75) for step in range(first_step, 2)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0, 3, 5], "lacks steps 1-2, 4 of 'ppo'"),
        ([0, 1, 1, 2, 3, 4, 5], "holds steps twice"),
        ([], "lacks steps 0-5 of"),
    ],
)
def test_a_gap_is_refused(tmp_path, steps, message):
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, [{"stage": "ppo", "step": step} for step in steps])
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=f"{message}.*checkpoint is 6 steps old; nothing was changed. Fix: bring the file"
    ):
        log_steps(path, "ppo", [6], first_step=6)
    assert path.read_bytes() == before


def test_sinks_get_every_step_and_cannot_stop_one(tmp_path, capsys):
    seen = []

    def tracker(step, values):
        seen.append((step, dict(values)))
        values.clear()
        if step == 1:
            raise ConnectionError("offline")

    with MetricLog(tmp_path / "m.jsonl", "ppo", 3, show=SHOW, sinks=[tracker, lambda step, values: 1 / step]) as log:
        returned = [log.write(step, {"objective/kl": 0.5}, tokens=1) for step in range(3)]
    assert seen == [(step, {"objective/kl": 0.5}) for step in range(3)]
    assert returned == [{"objective/kl": 0.5}] * 3
    assert [row["step"] for row in read_json_lines(tmp_path / "m.jsonl")] == [0, 1, 2]
    err = capsys.readouterr().err
    assert err.count("tracker failed at step 1, m.jsonl goes on (ConnectionError('offline'))") == 1
    assert err.count("<lambda> failed at step 0, m.jsonl goes on (ZeroDivisionError") == 1


def test_an_interrupt_in_a_sink_is_no_failure(tmp_path):
    def sink(step, values):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), MetricLog(tmp_path / "m.jsonl", "ppo", 3, show=SHOW, sinks=[sink]) as log:
        log.write(0, {"objective/kl": 0.5}, tokens=1)


def test_a_full_disk_names_the_step(tmp_path):
    with (
        injected("log_write@2=enospc"),
        pytest.raises(OSError, match=r"ppo step 1 was not logged .No space left on device"),
    ):
        log_steps(tmp_path / "m.jsonl", "ppo", range(3))
    assert [row["step"] for row in read_json_lines(tmp_path / "m.jsonl")] == [0]
