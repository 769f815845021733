"""The floor plan holds: imports go down only, heavy libraries stay in their rooms, nothing unsafe is called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "inhibitor"
MODULES = sorted(SOURCE.rglob("*.py"))
FLOORS = {
    "errors": 0,
    "config": 0,
    "runs": 0,
    "energy": 0,
    "ops": 1,
    "models": 2,
    "data": 2,
    "checkpoints": 2,
    "trainer": 2,
    "training": 2,
    "bench": 3,
    "distill": 3,
    "evaluate": 3,
    "quantization": 3,
    "publish": 4,
    "report": 4,
    "reproduce": 4,
    "cli": 5,
    "__init__": 5,
    "__main__": 6,
}
ROOMS = {  # library: the only rooms that may import it
    "datasets": {"data", "cli"},
    "matplotlib": {"report"},
    "pyarrow": {"data"},
    "ray": {"reproduce"},
    "rich": {"cli", "report"},
    "scipy": {"evaluate"},
    "sklearn": {"evaluate"},
    "triton": {"ops"},
    "typer": {"cli"},
    "yaml": {"config"},
}
UNSAFE = re.compile(
    r"\btorch\.load\(|\bimport pickle|\bjoblib\b|\byaml\.load\(|(?<![.\w])(?:eval|exec)\(|allow_pickle|shell=True"
    r"|trust_remote_code=True"
)


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "inhibitor" and len(parts) > 1:
            assert FLOORS[parts[1]] <= FLOORS[room(path)], f"{room(path)} imports {name} from a floor above"
        elif parts[0] in ROOMS:
            assert room(path) in ROOMS[parts[0]], f"{name} belongs to {ROOMS[parts[0]]}, not to {room(path)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_unsafe_call(path):
    found = UNSAFE.search(path.read_text(encoding="utf-8"))
    assert found is None, found


def test_importing_the_package_loads_no_heavy_room():
    program = (
        "import sys, inhibitor; "
        "print([m for m in ('matplotlib', 'sklearn', 'datasets', 'pyarrow', 'typer', 'accelerate',"
        " 'transformers.modeling_utils', 'torch._dynamo') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
