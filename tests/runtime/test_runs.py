"""A run's folder: started once, resumed only as it was started; files whole or absent."""

import dataclasses
import json
from pathlib import Path

import pytest

from rlhf_jax.runtime.runs import open_run, read_json_lines, write_json, write_json_lines


@dataclasses.dataclass(frozen=True)
class Inner:
    learning_rate: float = 0.1
    kl_target: float | None = 4.0


@dataclasses.dataclass(frozen=True)
class Config:
    run: Path = Path("runs/x")
    resume: bool = False
    seed: int = 0
    ppo: Inner = Inner()


def test_a_run_that_exists_is_never_overwritten(tmp_path):
    run = open_run(tmp_path / "deep" / "run", Config())
    stored = (run / "config.json").read_bytes()
    assert json.loads(stored)["ppo"] == {"learning_rate": 0.1, "kl_target": 4.0}
    with pytest.raises(FileExistsError, match="never overwritten: continue it with --resume or choose another --run"):
        open_run(run, Config())
    assert (run / "config.json").read_bytes() == stored


def test_resume_wants_the_configuration_of_the_start(tmp_path):
    run = open_run(tmp_path / "run", Config())
    assert open_run(run, Config(run=Path("elsewhere"), resume=True), resume=True) == run
    changed = Config(seed=1, ppo=Inner(learning_rate=0.2, kl_target=None))
    with pytest.raises(ValueError, match=r"nothing was changed\. ") as error:
        open_run(run, changed, resume=True)
    assert "ppo.kl_target: 4.0 -> None; ppo.learning_rate: 0.1 -> 0.2; seed: 0 -> 1." in str(error.value)
    assert json.loads((run / "config.json").read_text())["seed"] == 0


def test_a_foreign_folder_is_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        open_run(tmp_path, Config(), resume=True)


def test_a_start_that_was_killed_at_once_can_be_repeated(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    open_run(tmp_path, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_json_is_whole_or_untouched(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"kl": 1.5, "text": "Zoë"})
    with pytest.raises(ValueError, match=r"report\.json: not written, a number is not finite"):
        write_json(path, {"kl": float("nan")})
    assert json.loads(path.read_text()) == {"kl": 1.5, "text": "Zoë"}
    lines = tmp_path / "samples.jsonl"
    rows = [{"a": 1, "text": "one\u2028line"}, {"a": 0.1 + 0.2}]
    write_json_lines(lines, rows)
    with pytest.raises(ValueError, match=r"samples\.jsonl:2: not written"):
        write_json_lines(lines, [{"a": 1}, {"a": float("inf")}])
    assert list(read_json_lines(lines)) == rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "samples.jsonl"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st')
    rows = read_json_lines(path)
    assert next(rows) == {"step": 0}
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: no JSON"):
        next(rows)
