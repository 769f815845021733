"""Defects that the integer kernels could have, and a compact suite that finds each one: as test_kernels.py does."""

from pathlib import Path

import pytest

from tests import native
from tests.mutants import builds

pytestmark = builds.NEEDS
FORWARD, PACK, DRIVER, CODES = "integer_forward.h", "integer_pack.h", "integer_driver.cpp", "codes.h"
THREADS = "threads.h"
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
    (FORWARD, "a cap that is too low", "1 << (shift - 7)", "1 << (shift - 8)"),
    (FORWARD, "a negative t taken away", "Up ? Bytes::add_words(excess, away)", "Up ? Bytes::sub_words(excess, away)"),
    (FORWARD, "no shift right", "product = Bytes::right(product, shift - 16)", "product = Bytes::right(product, 0)"),
    (
        FORWARD,
        "hidden keys pass",
        "const uint32_t hidden = ~view(first + j, kPanelKeys);",
        "const uint32_t hidden = 0;",
    ),
    (FORWARD, "keys beyond the limit pass", "std::memset(z + limit, 255,", "std::memset(z + limit, 0,"),
    (FORWARD, "z beyond the limit as it was", "static_cast<size_t>(end - first - limit)", "0"),
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
        "part.batch, part.head, row));\n  if (p.reach",
        "part.batch, part.head, 0));\n  if (p.reach",
    ),
    (FORWARD, "a power of the keys of the first head", "-p.exponent[part.head]", "-p.exponent[0]"),
    (FORWARD, "a length in steps of the first head", "/ p.reach[part.head]", "/ p.reach[0]"),
    (FORWARD, "a length of 0 where nothing is heard", "heard = kUnheard + ", "heard = "),
    (FORWARD, "integers without what is heard", "p.value_dim + (p.reach ? 1 : 0)) * 4", "p.value_dim) * 4"),
    (FORWARD, "hidden keys heard", "std::memset(z + keys, 255, kAtom);", "", "avx512"),
    (FORWARD, "the last block alone heard", "p.value_dim] += heard_in", "p.value_dim] = heard_in"),
    (
        FORWARD,
        "half of what a vector holds heard",
        "lane < Bytes::width / 2; lane += 4",
        "lane < Bytes::width / 4; lane += 4",
    ),
    (FORWARD, "the reach of another head", "seen, p.reach[head])", "seen, p.reach[0])"),
    (FORWARD, "a reach that is halved", "Bytes::words(reach * 257)", "Bytes::words(reach)"),
    (FORWARD, "no room for what is heard", "+ (p.reach ? 16 : 0)", ""),
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
        THREADS,
        "the last rows left out",
        "splits = divide(queries, rows);",
        "splits = queries / rows ? queries / rows : 1;",
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
    (CODES, "inputs that truncate", "scaled + kMagic", "float(int32_t(scaled)) + kMagic"),
    (CODES, "inputs not clipped below", "scaled > low ? scaled : low", "scaled"),
    (CODES, "inputs not clipped above", "scaled < high ? scaled : high", "scaled"),
    (CODES, "one multiplier for all features", "multiplier[i]", "multiplier[0]"),
    (CODES, "NaN among inputs not seen", "nan |= x[i] != x[i]", "nan |= 0"),
    (DRIVER, "the last rows of inputs dropped", "item * block + block : rows;", "item * block + block : rows - 1;"),
    (AVX512, "NaN not seen", "_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0", "false", "avx512"),
    (
        AVX512,
        "truncates",
        "_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC",
        "_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC",
        "avx512",
    ),
]
NAMES = [builds.name_of(row) for row in CATALOGUE]


@pytest.fixture(scope="module")
def found_by(tmp_path_factory) -> builds.Found:
    folder = tmp_path_factory.mktemp("integer_mutants")
    floats = [
        native.compile_kernels(native.SOURCES, "portable", folder / "portable.o", "-O0"),
        native.compile_driver(native.SOURCES, (), folder / "driver.o", "-O0"),
    ]

    sets = native.instruction_sets()
    kernels = {name: native.compile_integer_kernels(native.SOURCES, name, folder, "-O0") for name in sets}
    drivers = {
        name: native.compile_integer_driver(native.SOURCES, (name,), folder / f"{name}_integer_driver.o", "-O0")
        for name in sets
    }

    def objects(sources: Path, part: Path, file: str, name: str) -> list[Path]:
        if file in (DRIVER, THREADS):
            mutant = native.compile_integer_driver(sources, (name,), part / "integer_driver.o", "-O0")
            return [mutant, *kernels[name], *floats]
        mutants = native.compile_integer_kernels(sources, name, part, "-O0")
        return [drivers[name], *mutants, *([] if name == "portable" else kernels["portable"]), *floats]

    every = native.compile_integer_driver(native.SOURCES, sets, folder / "integer_driver.o", "-O0")
    none = native.link(folder / "none.so", every, *(part for parts in kernels.values() for part in parts), *floats)
    return builds.find("tests.ops.integer_compact", folder, CATALOGUE, objects, none)


def test_the_catalogue_has_no_name_twice():
    assert len(set(NAMES)) == len(NAMES) >= 20


def test_the_kernels_themselves_survive(found_by):
    assert found_by["none"] == "survives"


@pytest.mark.parametrize("defect", NAMES)
def test_the_defect_is_found(defect, found_by, record_property):
    record_property("found by", builds.finder(found_by, defect))
