"""What was installed: the package without its native kernels, and the library with them."""

import json
import re
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from inhibitor.errors import OperatorError
from inhibitor.ops import cpu, integer_cpu
from tests.ops.cases import Case, arguments, relative_error

# The package as it is where there was no compiler: what is said, in the order in which it happens.
WITHOUT = """
import importlib.util, json, warnings

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.endswith("._kernels") else find_spec(name, *rest)
said, caught = {}, []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *rest: caught.append(str(message))

def warned():
    found = [message for message in caught if "slow" in message]
    caught.clear()
    return found

import torch
from inhibitor import inhibitor_attention, which_backend
from inhibitor.errors import OperatorError

x = torch.randn(1, 2, 5, 8)
said["choice"] = [which_backend().name, which_backend().reason]
inhibitor_attention(x, x, x, backend="torch")
inhibitor_attention(x.double(), x.double(), x.double())
try:
    inhibitor_attention(x, x, x, backend="cpu")
except OperatorError as error:
    said["error"] = [error.subject, error.got, error.remedy]
said["elsewhere"] = warned()
"""
EAGER = "said['same'] = torch.equal(inhibitor_attention(x, x, x), inhibitor_attention(x, x, x, backend='torch'))"
COMPILED = """
call = torch.compile(lambda x: inhibitor_attention(x, x, x), fullgraph=True, backend="eager")
said["same"] = torch.equal(call(x), inhibitor_attention(x, x, x, backend="torch"))
"""
END = """
said["first"] = warned()
inhibitor_attention(x, x, x)
said["later"] = warned()
print(json.dumps(said))
"""


@pytest.mark.parametrize("first_use", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_without_kernels_the_package_works_and_says_once_what_to_do(first_use):
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT + first_use + END], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    missing = "the package was installed without its native kernels"
    assert said["choice"] == ["torch", missing]
    assert said["error"][:2] == ["backend", missing]
    assert "pip install" in said["error"][2]
    assert said["same"]
    assert len(said["first"]) == 1
    assert missing in said["first"][0]
    assert said["error"][2] in said["first"][0]
    assert said["elsewhere"] == said["later"] == []


@pytest.mark.parametrize("name", cpu.instruction_sets() or ["none"])
def test_the_installed_kernels_agree_with_the_reference(name):
    if not cpu.INSTALLED:
        pytest.skip("installed without native kernels")
    given, grad = arguments(Case(2, 4, 2, 33, 47, 24, 20, mask="bk", parameters="per head"), torch.float32)
    expected = given.with_gradients(grad, "reference")
    with cpu.using(name):
        found = given.with_gradients(grad, "cpu")
    for key, tensor in expected.items():
        assert relative_error(found[key], tensor) <= 1e-4, key


@pytest.mark.parametrize("module", [cpu, integer_cpu], ids=["floats", "integers"])
def test_a_library_of_another_version_is_refused_and_it_says_what_to_do(module, monkeypatch):
    if not cpu.INSTALLED:
        pytest.skip("installed without native kernels")
    monkeypatch.setattr(module, "_PROBLEM", struct.Struct("=3q"))
    with pytest.raises(OperatorError, match=r"native kernels: expected .* of 24 bytes, got \d+\. .*pip install"):
        module._load()


@pytest.fixture(scope="module")
def elf():
    """Program headers, dynamic section and dynamic symbols of the library, as readelf prints them."""
    spec = find_spec("inhibitor.ops._kernels")
    if spec is None or spec.origin is None or not sys.platform.startswith("linux") or not shutil.which("readelf"):
        pytest.skip("no ELF library, or no readelf")
    options = ["--wide", "--program-headers", "--dynamic", "--dyn-syms"]
    text = subprocess.run(["readelf", *options, spec.origin], capture_output=True, text=True, check=True).stdout
    if "san_" in text:
        pytest.skip("built with sanitizers")
    return text


def test_the_stack_is_not_executable_and_addresses_are_bound_before_use(elf):
    flags = {line.split()[0]: line.split()[6:-1] for line in elf.splitlines() if line.startswith("  GNU_")}
    assert "GNU_RELRO" in flags
    assert "E" not in "".join(flags["GNU_STACK"])
    assert "BIND_NOW" in elf


def test_only_our_functions_are_exported_and_only_the_compilers_libraries_required(elf):
    symbols = re.findall(r"^ *\d+: \w+ +\d+ (\w+) +(\w+) +\w+ +(\w+) (\S+)", elf, re.MULTILINE)
    defined = {name for kind, _, where, name in symbols if where != "UND"}
    assert defined
    assert all(name.startswith("inhibitor_") for name in defined), defined
    required = {name for _, bind, where, name in symbols if where == "UND" and bind == "GLOBAL"}
    assert all(re.search("@(GLIBC|GLIBCXX|CXXABI|GCC)_", name) for name in required), required
    libraries = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", elf))
    assert libraries <= {"libstdc++", "libgcc_s", "libc", "libm", "libpthread"} | {
        library for library in libraries if library.startswith("ld-linux")
    }
