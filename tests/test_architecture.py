"""The package's architecture, enforced: who may import whom, and what importing must not do.

::

    errors  <-  logs  <-  comm  <-  { nn  optim  data  checkpoint  jobs  xla }  <-  cli

A layer may import itself and what is left of it. The ones in braces do not know each other: ``nn`` and
``optim`` meet through small interfaces of what they hand each other. Only ``comm`` knows mpi4py, and only one
file of ``xla`` knows torch-xla.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.local

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hpcpar"

BASE = {"errors", "logs", "comm"}
MAY_IMPORT = {
    "errors": set(),
    "logs": {"errors"},
    "comm": {"errors", "logs"},
    "nn": BASE,
    "optim": BASE,
    "data": BASE,
    "checkpoint": BASE,
    "jobs": BASE,
    "xla": BASE,
    "cli": BASE | {"nn", "optim", "data", "checkpoint", "jobs", "xla"},
    "__main__": {"cli"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def layer_of(path: Path) -> str:
    """Return ``comm`` for ``hpcpar/comm/bucket.py``, ``errors`` for ``hpcpar/errors.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, full dotted name) of every import, at the top or in a function, relative or not."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def forbidden(path: Path, name: str) -> bool:
    top, *rest = name.split(".")
    if top == "mpi4py":
        return layer_of(path) != "comm"
    if top == "torch_xla":
        return path != PACKAGE / "xla/adapter.py"
    if top in {"examples", "benchmarks", "jobs", "tests"}:
        return True
    if top != "hpcpar" or layer_of(path) == "__init__":
        return False
    if rest == ["__version__"]:
        return False
    # `import hpcpar` from inside would give access to every layer, and to a half-initialised package.
    return not rest or rest[0] not in MAY_IMPORT[layer_of(path)] | {layer_of(path)}


@each_module
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    wrong = [f"line {line}: {name}" for line, name in imported_names(path) if forbidden(path, name)]
    assert not wrong, f"{path.relative_to(ROOT)} must not import {wrong}"


@each_module
def test_module_belongs_to_a_layer(path: Path) -> None:
    assert layer_of(path) in {*MAY_IMPORT, "__init__"}


@each_module
def test_module_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@each_module
def test_library_never_prints(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert layer_of(path) == "cli" or not calls, f"{path.relative_to(ROOT)} prints at lines {calls}"


@pytest.mark.parametrize(
    ("where", "name", "is_forbidden"),
    [
        ("nn/data_parallel.py", "hpcpar.comm.bucket", False),
        ("nn/data_parallel.py", "hpcpar.nn.stats", False),
        ("nn/data_parallel.py", "hpcpar.optim", True),
        ("nn/data_parallel.py", "hpcpar", True),
        ("nn/data_parallel.py", "mpi4py.MPI", True),
        ("optim/daso.py", "hpcpar.nn.data_parallel", True),
        ("comm/communicator.py", "mpi4py.MPI", False),
        ("comm/communicator.py", "hpcpar.nn", True),
        ("xla/adapter.py", "torch_xla.core.xla_model", False),
        ("xla/manager.py", "torch_xla", True),
        ("xla/manager.py", "hpcpar.optim", True),
        ("errors.py", "hpcpar.comm", True),
        ("cli/info.py", "hpcpar.nn", False),
        ("cli/bench.py", "benchmarks.allreduce", True),
        ("__init__.py", "hpcpar.optim", False),
    ],
)
def test_rules_tell_right_from_wrong(where: str, name: str, is_forbidden: bool) -> None:
    assert forbidden(PACKAGE / where, name) is is_forbidden


def test_importing_neither_initialises_mpi_nor_loads_the_compiler() -> None:
    """The compiler of torch takes longer to import than everything else together."""
    script = """
import sys
import hpcpar, hpcpar.comm, hpcpar.nn, hpcpar.optim
for name in "mpi4py.MPI", "torch._dynamo":
    if name in sys.modules:
        sys.exit(f"importing hpcpar has imported {name}")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["import hpcpar.xla", "hpcpar.xla"])
def test_without_torch_xla_only_what_needs_it_is_an_error_that_says_what_to_install(how: str) -> None:
    script = f"""
import sys
sys.modules["torch_xla"] = None  # what import finds then is nothing
import hpcpar, hpcpar.comm, hpcpar.nn, hpcpar.optim
try:
    {how}
except ImportError as error:
    words = str(error)
    assert error.name == "torch_xla", error.name
    assert words.startswith("hpcpar.xla must have torch-xla") and "pip install 'hpcpar[xla]'" in words, words
else:
    sys.exit("there was no error")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
