"""A run's folder: started once, resumed only as it was started; files whole or absent."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from rlhf_jax.runtime.runs import (
    check_writable,
    locked,
    open_run,
    read_json_lines,
    refuse_changes,
    write_json,
    write_json_lines,
)


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


def test_one_process_and_one_with_at_a_time(tmp_path):
    run = tmp_path / "deep" / "run"
    with locked(run):
        text = (run / "run.lock").read_text()
        assert text.startswith(f"pid {os.getpid()} on ")
        with (
            pytest.raises(BlockingIOError, match=f"in use by pid {os.getpid()} on .* \\(since 2.*nothing was started"),
            locked(run),
        ):
            pass
        assert (run / "run.lock").read_text() == text
        open_run(run, Config())  # a lock is no content
    with locked(run):
        assert len((run / "run.lock").read_text().splitlines()) == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_nothing_is_told_in_one_line(tmp_path, monkeypatch, code):
    def refuse(path, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    for use in (check_writable, lambda run: open_run(run, Config()), lambda run: locked(run).__enter__()):
        with pytest.raises(
            OSError, match=f"cannot write to .*x \\({os.strerror(code)}\\); nothing was started. Fix: "
        ) as error:
            use(tmp_path / "x")
        assert error.value.errno == code
        assert "\n" not in str(error.value)


def test_a_folder_below_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cannot write to .*file/run \(Not a directory\)"):
        open_run(tmp_path / "file" / "run", Config())


def test_changed_facts_are_listed_and_can_be_forced():
    stored, wanted = {"data": {"rows": 40}, "tokenizer": "9f"}, {"data": {"rows": 41}, "tokenizer": "9f", "format": 2}
    with pytest.raises(
        ValueError,
        match=r"here was started with .* data.rows: 40 -> 41; format: nothing -> 2. Fix: resume with the first",
    ):
        refuse_changes("here", stored, wanted)
    assert refuse_changes("here", stored, wanted, force=True) == ["data.rows: 40 -> 41", "format: nothing -> 2"]
    assert refuse_changes("here", stored, {"tokenizer": "9f", "data": {"rows": 40}}) == []
