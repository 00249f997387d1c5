"""The README's code runs as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")


def test_the_example_composes_and_learns(capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    rewards = [float(value) for value in re.findall(r"reward (\S+),", capsys.readouterr().out)]
    assert len(rewards) == 12
    assert rewards[0] < 1 < rewards[-1]
    assert rewards[-1] > rewards[0] + 2


def test_the_two_commands_are_there():
    for extras, program in (("text,plots", "python experiments/rlhf.py"), ("test,parity", "pytest -n 2")):
        install = f'.venv/bin/pip install -c constraints.txt -e ".[{extras}]"'
        assert f"python3 -m venv .venv && {install} && .venv/bin/{program}\n" in README
