"""Properties of the whole repository: floors, one shift, no dangerous or vague code, light imports, a complete map."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "rlhf_jax").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in LIBRARY + EXPERIMENTS}
PACKAGE = {name: tree for name, tree in TREES.items() if name.startswith("rlhf_jax/")}

FLOORS = {
    "types": set(),
    "functional": {"types"},
    "models": {"types", "functional"},
    "data": {"types", "functional"},
    "generation": {"types", "functional", "models"},
    "objectives": {"types", "functional", "models"},
    "training": {"types", "functional", "models", "data", "generation", "objectives"},
    "runtime": set(),
}
"""What each floor may import besides itself; `runtime` knows no word of RL."""


def imports(tree):
    """Absolute names of everything that a module imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            if node.module == "rlhf_jax":
                yield from (f"rlhf_jax.{alias.name}" for alias in node.names)


def test_imports_only_go_down():
    for name, tree in PACKAGE.items():
        floor = name.split("/")[1].removesuffix(".py")
        below = {module.split(".")[1] for module in imports(tree) if module.startswith("rlhf_jax.")} - {floor}
        assert floor == "__init__" or below <= FLOORS[floor], f"{name} imports {below - FLOORS[floor]}"
        assert not any(module.split(".")[0] in ("torch", "tensorflow", "clu") for module in imports(tree)), name


def is_one_position_cut(node):
    """`x[:, 1:]`, `x[:, :-1]` or the same behind `...`: a shift in time."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)):
        return False
    last = ast.unparse(node.slice.elts[-1])
    return last in ("1:", ":-1") and all(ast.unparse(e) in (":", "...") for e in node.slice.elts[:-1])


def test_one_function_shifts_by_one():
    """`functional.masking.shift_right` pads; nothing slices by one along time, and its name is defined once."""
    for name, tree in PACKAGE.items():
        cuts = [ast.unparse(node) for node in ast.walk(tree) if is_one_position_cut(node)]
        assert not cuts, f"{name}: {cuts}; use shift_right"
        rolls = "jnp.roll" in ast.unparse(tree) and name != "rlhf_jax/functional/logprobs.py"  # a gather's index there
        assert not rolls, f"{name}: jnp.roll; use shift_right"
        shifts = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("shift")]
        assert shifts == (["shift_right"] if name == "rlhf_jax/functional/masking.py" else []), name


@pytest.mark.parametrize("name", TREES)
def test_nothing_dangerous_or_vague(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert not re.search(r"\b(everything|Exception|BaseException)\b", caught), f"{name}:{node.lineno}: {caught}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile"), f"{name}:{node.lineno}: {node.func.id}"
            has_default = node.func.id == "getattr" and len(node.args) == 3
            assert not (has_default and "config" in ast.unparse(node.args[0])), f"{name}:{node.lineno}: getattr default"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert ast.unparse(node.value) == "False", f"{name}: {node.arg}"
    modules = {module.split(".")[0] for module in imports(TREES[name])}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, name
    assert "utils" not in name
    limit = 420 if name in PACKAGE else 235
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= limit, f"{name}: more than {limit} lines"


def public(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("name", PACKAGE)
def test_everything_public_is_explained(name):
    assert ast.get_docstring(PACKAGE[name]), f"{name} has no docstring"
    silent = [qualified for qualified, node in public(PACKAGE[name]) if not ast.get_docstring(node)]
    assert not silent, f"{name}: no docstring: {silent}"


def test_import_is_light():
    heavy = ("transformers", "tensorflow", "tensorflow_datasets", "torch", "matplotlib", "orbax", "wandb")
    code = f"import rlhf_jax, sys; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout.split() == []


def test_readme_maps_every_file():
    text = (ROOT / "README.md").read_text("utf-8")
    paths = [path.relative_to(ROOT).as_posix() for path in LIBRARY + EXPERIMENTS]
    missing = [path for path in paths if f"`{path}`" not in text and not path.endswith("__init__.py")]
    assert not missing, f"the README's map lacks {missing}"
    gone = [path for path in re.findall(r"`((?:rlhf_jax|experiments)/[\w/]+\.py)`", text) if not (ROOT / path).exists()]
    assert not gone, f"the README's map names {gone}, which are no files"


def test_only_source_is_tracked():
    """No compiled program, data set or weight file, which a run started in this folder may leave behind."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if listed.returncode:
        pytest.skip("not a git checkout")
    known = {".py", ".md", ".toml", ".txt", ".ipynb", ".typed"}
    kept = re.compile(r"tests/golden/\w+\.json|docs/\w+\.png")
    names = [name for name in listed.stdout.splitlines() if not kept.fullmatch(name)]
    odd = [name for name in names if Path(name).suffix not in known]
    assert sorted(odd) == [".ci/run", ".gitignore", "LICENSE"]
