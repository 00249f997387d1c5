"""The README's code runs as it stands there."""

import re
from pathlib import Path

import jax
import numpy as np
import tiny

import rlhf_jax as rl
from rlhf_jax.models import huggingface

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")
COMPOSE, CHECKPOINTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_composes_and_learns(capsys):
    exec(compile(COMPOSE, "README.md", "exec"), {})
    rewards = [float(value) for value in re.findall(r"reward (\S+),", capsys.readouterr().out)]
    assert len(rewards) == 12
    assert rewards[0] < 1 < rewards[-1]
    assert rewards[-1] > rewards[0] + 2


def test_the_example_loads_and_saves(tmp_path, monkeypatch):
    huggingface.save(tmp_path / "DIRECTORY", tiny.init_params(), huggingface.llama_config(tiny.CONFIG))
    monkeypatch.chdir(tmp_path)
    names = {"rl": rl}
    exec(compile(CHECKPOINTS, "README.md", "exec"), names)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load("OUT").params, tiny.init_params())
    assert names["config"] == tiny.CONFIG


def test_the_two_commands_are_there():
    for extras, program in (("text,plots", "python experiments/rlhf.py"), ("test,parity", "pytest -n 2")):
        install = f'.venv/bin/pip install -c constraints.txt -e ".[{extras}]"'
        assert f"python3 -m venv .venv && {install} && .venv/bin/{program}\n" in README
