"""Defects that the integer kernels could have, and a compact suite that finds each one: as test_kernels.py does."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import native
from tests.mutants.test_kernels import TOGETHER, mutate

pytestmark = [
    pytest.mark.skipif(native.COMPILER is None, reason="no C++ compiler: set CXX or install one"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]
FORWARD, PACK, DRIVER = "integer_forward.h", "integer_pack.h", "integer_driver.cpp"
PORTABLE, AVX2, AVX512 = (f"simd/integer_{name}.h" for name in ("portable", "avx2", "avx512"))

# file, defect, text, what stands there instead[, instruction set]
CATALOGUE = [
    (FORWARD, "the mean rounded down", "(2 * total + count) / (2 * count)", "total / count"),
    (FORWARD, "the threshold added", "/ (2 * count) : 0) - threshold", "/ (2 * count) : 0) + threshold"),
    (FORWARD, "t not limited below", "middle < -65535 ? -65535", "middle < -99999 ? -65535"),
    (FORWARD, "t not limited above", "middle > 65535 ? 65535", "middle > 199999 ? 65535"),
    (FORWARD, "always centred", "p.center ? count_visible", "true ? count_visible"),
    (FORWARD, "the mean over padding", "count_visible(views[r]) : 0", "views[r].limit : 0"),
    (
        FORWARD,
        "the sum of whole panels forgotten",
        "totals[r] += Bytes::total_of",
        "totals[r] = totals[r] + 0 * Bytes::total_of",
    ),
    (FORWARD, "the sum of the last panel forgotten", "totals[r + t] += sum;", ""),
    (FORWARD, "hidden distances in the sum", "* (visible >> j & 1)", ""),
    (FORWARD, "another bias of the sums", "+= kPanelKeys << 15", "+= kPanelKeys << 14"),
    (
        FORWARD,
        "a panel partly hidden taken for whole",
        "views[r + t].limit >= first + kPanelKeys",
        "views[r + t].limit > first",
    ),
    (FORWARD, "bits not looked at", "whole &= !views[r + t].bits && ", "whole &= "),
    (
        FORWARD,
        "the first group of features twice",
        "for (int64_t g = 1; g < groups; g++)",
        "for (int64_t g = 0; g < groups; g++)",
    ),
    (
        FORWARD,
        "the last group of features dropped",
        "for (int64_t g = 1; g < groups; g++)",
        "for (int64_t g = 1; g + 1 < groups; g++)",
    ),
    (FORWARD, "steep slopes taken for flat ones", "shift < 16 ? middle", "shift < 15 ? middle"),
    (FORWARD, "no cap on the way to 16 bits", "Bytes::min_words(excess, cap)", "excess"),
    (FORWARD, "a cap that is too low", "(127 << shift >> 15) + 1", "(120 << shift >> 15)"),
    (FORWARD, "a negative t taken away", "Up ? Bytes::add_words(excess, away)", "Up ? Bytes::sub_words(excess, away)"),
    (FORWARD, "no shift right", "product = Bytes::right(product, shift - 16)", "product = Bytes::right(product, 0)"),
    (
        FORWARD,
        "hidden keys pass",
        "const uint32_t hidden = ~view(first + j, kPanelKeys);",
        "const uint32_t hidden = 0;",
    ),
    (FORWARD, "keys beyond the limit pass", "std::memset(z + limit, 255,", "std::memset(z + limit, 0,"),
    (FORWARD, "z of 127 beyond the limit is kept", "static_cast<size_t>(end - first - limit)", "0"),
    (FORWARD, "-128 as it is", "from[i] < -127 ? int8_t{-127} : from[i]", "from[i]"),
    (FORWARD, "the unsigned form takes absolute values", "!negative ? v : Signed ? -v : 0", "!negative ? v : -v"),
    (FORWARD, "the sign lost", "sign[i] = Signed && negative ? 255 : 1", "sign[i] = 1"),
    (FORWARD, "the last quad dropped", "(keys + 3) / 4, m.magnitude", "keys / 4, m.magnitude"),
    (
        FORWARD,
        "only the first block of keys",
        "first < keys; first += kIntegerBlock",
        "first < least(keys, 1); first += kIntegerBlock",
    ),
    (
        FORWARD,
        "the last slice dropped",
        "for (; slice < slices; slice++)",
        "for (; slice + 1 < slices; slice++)",
        "avx512",
    ),
    (FORWARD, "sums not cleared", "std::memset(m.output, 0,", "std::memset(m.output, 1,"),
    (FORWARD, "distance sums not cleared", "std::memset(m.sums, 0,", "std::memset(m.sums, 1,"),
    (
        FORWARD,
        "padding of a query not cleared",
        "std::memset(codes + m.query_step - 8, 0, 8)",
        "std::memset(codes + m.query_step - 8, 1, 8)",
    ),
    (FORWARD, "NaN of a query that sees nothing refused", "&& views[r].limit > 0", ""),
    (FORWARD, "NaN in the query passes", "if (nan) return kNanInQuery;", ""),
    (FORWARD, "the head of another part", "if (*packed == name) return kNone;", "if (*packed >= 0) return kNone;"),
    (FORWARD, "a cache without its mask", "nullptr, p.mask.data != nullptr}", "nullptr, false}"),
    (
        FORWARD,
        "the factor of the first row",
        "part.batch, part.head, row));\n  float* to",
        "part.batch, part.head, 0));\n  float* to",
    ),
    (
        PACK,
        "rounds ties away from even",
        "std::bit_cast<int32_t>(scaled + kMagic) + offset",
        "static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f)) + zero",
    ),
    (PACK, "the lower end of the value is -126", "-127.0f, 0, floats", "-126.0f, 0, floats"),
    (
        PACK,
        "zero of query and key apart",
        "batch, head, inverse, -128.0f, 128, floats",
        "batch, head, inverse, -128.0f, 127, floats",
    ),
    (PACK, "no upper end", "scaled < 127.0f ? scaled : 127.0f", "scaled"),
    (PACK, "NaN not seen", "nan |= x != x;", ""),
    (PACK, "NaN in the key passes", "if (nan) return kNanInKey;", "nan = false;"),
    (PACK, "the step of the first head", "p.value_inverse[key_head * (p.heads / p.key_heads)]", "p.value_inverse[0]"),
    (PACK, "ignores the stride of features", "codes[i] = from[i * step]", "codes[i] = from[i]"),
    (PACK, "keys in another order", "k % 4 * kAtom + k / 4 * 8", "k / 8 * kAtom + k % 8 * 8"),
    (PACK, "a quad that is not aligned", "(length + j) % 4 == 0 && j + 4", "j + 4"),
    (PACK, "appended keys at the front", "place_key(codes, length + j, groups", "place_key(codes, j, groups"),
    (
        PACK,
        "padding of a key not cleared",
        "0, static_cast<size_t>(most(groups * 8, slices * 64)));  // what",
        "1, static_cast<size_t>(most(groups * 8, slices * 64)));  // what",
    ),
    (
        DRIVER,
        "the last rows left out",
        "splits = divide(p.queries, rows);",
        "splits = p.queries / rows ? p.queries / rows : 1;",
    ),
    (
        DRIVER,
        "faults are lost",
        "return done ? fault.load() : kNoMemory;\n}\n\n// Packs",
        "return done ? kNone : kNoMemory;\n}\n\n// Packs",
    ),
    (PORTABLE, "sums that wrap", "a.word[i] + b.word[i] > 65535 ? 65535 : ", ""),
    (AVX2, "words taken for signed ones", "min_words(a, words(255))", "a", "avx2"),
    (AVX2, "differences of words that wrap", "_mm256_subs_epu16", "_mm256_sub_epi16", "avx2"),
    (AVX512, "words that wrap to bytes", "_mm512_cvtusepi16_epi8", "_mm512_cvtepi16_epi8", "avx512"),
    (AVX512, "differences of bytes that wrap", "_mm512_subs_epu8", "_mm512_sub_epi8", "avx512"),
    (
        AVX512,
        "lanes added up in 32 bits",
        "_mm512_reduce_add_epi64(_mm512_add_epi64(low, high))",
        "_mm512_reduce_add_epi32(sum)",
        "avx512",
    ),
    (AVX512, "NaN not seen", "_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0", "false", "avx512"),
    (
        AVX512,
        "truncates",
        "_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC",
        "_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC",
        "avx512",
    ),
]
IDS = [f"{row[0]}: {row[1]}" for row in CATALOGUE]


def build(folder: Path, shared: list[Path], row: tuple[str, ...]) -> Path | Exception:
    """The library of a mutant; the float operator's objects are ``shared``."""
    file, _, old, new, *names = row
    try:
        sources = mutate(folder / "csrc", file, old, new)
        objects = native.compile_integers(sources, tuple(dict.fromkeys([*names, "portable"])), folder, "-O0")
        return native.link(folder / "kernels.so", *objects, *shared)
    except (LookupError, RuntimeError) as error:
        return error


@pytest.fixture(scope="module")
def found_by(tmp_path_factory) -> dict[str, str | Exception]:
    """For each defect, and for the kernels as they are, the check that found it."""
    folder = tmp_path_factory.mktemp("integer_mutants")
    names = native.instruction_sets()
    shared = [
        native.compile_kernels(native.SOURCES, "portable", folder / "portable.o", "-O0"),
        native.compile_driver(native.SOURCES, (), folder / "driver.o", "-O0"),
    ]
    rows = [row for row in CATALOGUE if len(row) < 5 or row[4] in names]
    folders = [folder / str(number) for number in range(len(rows))]
    for part in folders:
        part.mkdir()
    with ThreadPoolExecutor(TOGETHER) as pool:
        built = pool.map(lambda pair: build(pair[0], shared, pair[1]), zip(folders, rows, strict=True))
        libraries = {f"{row[0]}: {row[1]}": library for row, library in zip(rows, built, strict=True)}
    (folder / "none").mkdir()
    objects = native.compile_integers(native.SOURCES, names, folder / "none", "-O0")
    libraries["none"] = native.link(folder / "none.so", *objects, *shared)
    ready = {name: path for name, path in libraries.items() if isinstance(path, Path)}
    paths = list(ready.values())
    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = "".join(pool.map(suite, [paths[i::TOGETHER] for i in range(TOGETHER)]))
    by_path = dict(line.split(" ", 1) for line in answers.splitlines())
    failed = {name: error for name, error in libraries.items() if isinstance(error, Exception)}
    return {name: by_path[str(path)] for name, path in ready.items()} | failed


def suite(paths: list[Path]) -> str:
    command = [sys.executable, "-m", "tests.ops.integer_compact", *map(str, paths)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=native.ROOT, env=environment, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_catalogue_has_no_name_twice():
    assert len(set(IDS)) == len(IDS) >= 20


def test_the_kernels_themselves_survive(found_by):
    assert found_by["none"] == "survives"


@pytest.mark.parametrize("defect", IDS)
def test_the_defect_is_found(defect, found_by, record_property):
    if defect not in found_by:
        pytest.skip("this processor has not the instruction set")
    found = found_by[defect]
    if isinstance(found, Exception):
        raise found
    assert found_by["none"] == "survives", "what the kernels themselves fail proves nothing about a defect"
    assert found != "survives"
    record_property("found by", found)
