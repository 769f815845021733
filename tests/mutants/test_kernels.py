"""Defects that the native kernels could have, and a compact suite that finds each one.

A mutant is csrc with one text replaced, compiled for one instruction set, run in a process of its own. A text that is
no longer in the source is an error: the catalogue follows the code.
"""

from pathlib import Path

import pytest

from tests import native
from tests.mutants import builds

pytestmark = builds.NEEDS

# file, defect, text, what stands there instead[, instruction set]
CATALOGUE = [
    # backward.h
    ("backward.h", "wrong sign of the key's gradient", "selected ? -m.grad_key_rows", "selected ? m.grad_key_rows"),
    ("backward.h", "wrong sign of the inhibition's gradient", "Simd::sub(Simd::zero(), sum[r])", "sum[r]"),
    (
        "backward.h",
        "a score of zero passes its gradient",
        "Simd::greater(Simd::load(z + j), Simd::zero())",
        "Simd::bits(view(j, Simd::width))",
    ),
    (
        "backward.h",
        "a value equal to Z passes its gradient",
        "Simd::greater(magnitude, inhibition[r])",
        "Simd::greater(Simd::add(magnitude, Simd::set(1e-6f)), inhibition[r])",
    ),
    (
        "backward.h",
        "the value's sign forgotten in the gradient",
        "Signed ? Simd::signed_one(value) : Simd::set(1.0f)",
        "Simd::set(1.0f)",
    ),
    ("backward.h", "centring skipped in the gradient", "Simd::set(center && count ?", "Simd::set(!center && count ?"),
    (
        "backward.h",
        "the gradient's mean over padding",
        "total / static_cast<double>(count)",
        "total / static_cast<double>(view.limit + 1)",
    ),
    (
        "backward.h",
        "the mean of scores over padding",
        "sum / static_cast<double>(counts[r])",
        "sum / static_cast<double>(p.keys)",
    ),
    ("backward.h", "delta's gradient of the last rows only", "result.delta += sums.delta", "result.delta = sums.delta"),
    ("backward.h", "gamma's gradient without the scale", "sums.gamma * static_cast<double>(scale)", "sums.gamma"),
    ("backward.h", "gamma's gradient of half the distance", "return {2.0 * product, total}", "return {product, total}"),
    (
        "backward.h",
        "gradients of query and key without gamma",
        "Simd::mul(g, Simd::set(slope))",
        "Simd::mul(g, Simd::set(slope > 0 ? 1.0f : -1.0f))",
    ),
    (
        "backward.h",
        "hidden keys pass their gradient",
        "Simd::select(Simd::bits(views[r](j, Simd::width)), z, hidden)",
        "z",
    ),
    (
        "backward.h",
        "value gradients not cleared",
        "std::memset(m.grad_value_panels, 0,",
        "std::memset(m.grad_value_panels, 1,",
    ),
    ("backward.h", "key gradients not cleared", "std::memset(m.grad_key_rows, 0,", "std::memset(m.grad_key_rows, 1,"),
    (
        "backward.h",
        "query gradients not cleared",
        "std::memset(m.grad_query_rows, 0,",
        "std::memset(m.grad_query_rows, 1,",
    ),
    (
        "backward.h",
        "the last vector of features dropped",
        "feature < m.head_step; feature += Simd::width",
        "feature + Simd::width < m.head_step; feature += Simd::width",
    ),
    (
        "backward.h",
        "only the first key block",
        "first < keys; first += kKeyBlock",
        "first < least(keys, 64); first += kKeyBlock",
    ),
    ("backward.h", "the rest of the scores' gradients not cleared", "grad[j] = 0.0f;", "grad[j] = 1.0f;"),
    (
        "backward.h",
        "keys out of sight not written",
        "next += selected;\n  }",
        "next += selected;\n    if (next == selection.count) break;\n  }",
    ),
    ("backward.h", "the next row's gradient", "m.grad + r * p.value_dim);", "m.grad + (rows - 1 - r) * p.value_dim);"),
    ("backward.h", "what is heard passes the wrong way", "share = Simd::set(-g);", "share = Simd::set(g);"),
    (
        "backward.h",
        "keys out of reach pass their gradient",
        "const auto hears = Simd::greater(depth, Simd::load(z + j));",
        "const auto hears = Simd::greater(Simd::load(z + j), depth);",
    ),
    ("backward.h", "reach's gradient of the last rows only", "result.reach += reach_", "result.reach = reach_"),
    (
        "backward.h",
        "the gradient of another feature",
        "[p.value_dim * p.grad_output",
        "[(p.value_dim - 1) * p.grad_output",
    ),
    # forward.h
    (
        "forward.h",
        "hidden keys are heard",
        "Simd::add(sum, Simd::where(Simd::bits(view(j, Simd::width)), left))",
        "Simd::add(sum, left)",
    ),
    ("forward.h", "the reach of another head", "views[r], p.reach[part.head])", "views[r], p.reach[0])"),
    ("forward.h", "what a careful row hears is lost", "output[p.value_dim] = heard;", "output[p.value_dim] = 0.0f;"),
    (
        "forward.h",
        "the sums of another block",
        "m.values.sums + first / ValueSlices::kStep",
        "m.values.sums + 0 * first / ValueSlices::kStep",
    ),
    ("forward.h", "the list is not reset", "  list.count = 0;\n", ""),
    (
        "forward.h",
        "the last key of a block dropped",
        "for (int64_t j = 0; j < keys; j++) {\n    Simd::Vector value",
        "for (int64_t j = 0; j + 1 < keys; j++) {\n    Simd::Vector value",
    ),
    ("forward.h", "no shift", "2.0f * slope, mean, delta, m.positive", "2.0f * slope, mean, 0.0f, m.positive"),
    (
        "forward.h",
        "never centred",
        "const float mean = p.center && count ? static_cast<float>(sum /",
        "const float mean = false && count ? static_cast<float>(sum /",
    ),
    ("forward.h", "half the score", "2.0f * slope, mean, delta", "slope, mean, delta"),
    ("forward.h", "sums of values from the first key on", "j % kBlock == 0 ? x", "j == 0 ? x"),
    (
        "forward.h",
        "always signed",
        "if (p.is_signed) {\n      add_all_values<true>",
        "if (true) {\n      add_all_values<true>",
    ),
    (
        "forward.h",
        "what is not finite is not computed again",
        "if (careful[r] || !is_finite(Simd::sum(zero)))",
        "if (false)",
    ),
    (
        "forward.h",
        "NaN counts as inhibited",
        "shifted < 0.0f ? 0.0f : shifted;  // NaN stays",
        "shifted > 0.0f ? shifted : 0.0f;",
    ),
    ("forward.h", "packed for another batch", "part.batch * p.heads + part.head;", "part.head;"),
    (
        "forward.h",
        "a few values beyond the last whole step forgotten",
        "j = full * ValueSlices::kStep; j < count",
        "j = full * ValueSlices::kStep; j + 1 < count",
    ),
    (
        "forward.h",
        "scores not scaled by gamma",
        "p.gamma[part.head] * static_cast<float>(p.scale), delta",
        "p.gamma[0] * static_cast<float>(p.scale), delta",
    ),
    # keys.h
    ("keys.h", "causal without the diagonal", "selection[middle] <= row", "selection[middle] < row"),
    ("keys.h", "causal one too far", "selection[middle] <= row", "selection[middle] <= row + 1"),
    (
        "keys.h",
        "the mask inverted",
        "uint64_t{visible[selection[j + t] * step] != 0}",
        "uint64_t{visible[selection[j + t] * step] == 0}",
    ),
    (
        "keys.h",
        "a mask row skipped",
        "for (int64_t i = 0; i < rows; i++) {\n    const uint8_t* visible",
        "for (int64_t i = 1; i < rows; i++) {\n    const uint8_t* visible",
    ),
    ("keys.h", "every row masked as the first", "mask_row(p, batch, head, row);", "mask_row(p, batch, head, 0);"),
    ("keys.h", "every head masked as the first", "at(p.mask, 1, batch, head, row)", "at(p.mask, 1, batch, 0, row)"),
    ("keys.h", "every batch masked as the first", "at(p.mask, 1, batch, head, row)", "at(p.mask, 1, 0, head, row)"),
    (
        "keys.h",
        "a stride of the mask ignored",
        "visible[selection[j + t] * step] != 0",
        "visible[selection[j + t]] != 0",
    ),
    ("keys.h", "keys never left out", "selection.count += any[j] != 0", "selection.count += 1"),
    (
        "keys.h",
        "the mask is taken for the same in all rows",
        "selection.by_row |= any[j] != all[j]",
        "selection.by_row |= false",
    ),
    ("keys.h", "bits of the next word", "bits[j >> 6] >> (j & 63)", "bits[j >> 6] >> (j & 31)"),
    # rows.h
    ("rows.h", "the feature's stride ignored", "row[i] = from[i * step];", "row[i] = from[i];"),
    ("rows.h", "the heads' stride ignored", "b * tensor.stride[1]", "b * (tensor.stride[1] ? tensor.stride[1] : 1)"),
    ("rows.h", "bfloat16 by truncation", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    (
        "rows.h",
        "bfloat16 with ties away from zero",
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "(bits + 0x8000) >> 16",
    ),
    ("rows.h", "float16 by truncation", "bits += 0xFFF + ((bits >> 13) & 1) - (112u << 23)", "bits -= 112u << 23"),
    ("rows.h", "float16 overflows too early", "bits >= 0x477FF000", "bits >= 0x477FE000"),
    ("rows.h", "float16's subnormal numbers are zero", "magnitude += 0.5f;", "magnitude = 0.5f;"),
    ("rows.h", "float16's infinity is a number", "(x & 0x7C00) == 0x7C00", "false"),
    # scores.h
    (
        "scores.h",
        "the query's sum without its last feature",
        "for (int64_t f = 0; f < p.head_dim; f++) {\n      for (int64_t i = 0; i < kTogether",
        "for (int64_t f = 0; f + 1 < p.head_dim; f++) {\n      for (int64_t i = 0; i < kTogether",
    ),
    (
        "scores.h",
        "a tail of rows not scored",
        "for_groups<Simd::score_rows, 4, 1>(rows,",
        "for_groups<Simd::score_rows, 4, 1>(rows - 1,",
    ),
    (
        "scores.h",
        "scores rounded to bfloat16",
        "      Simd::store(scores + r * step + v * Simd::width, score);",
        "      for (int i = 0; i < Simd::width && end == head_dim; i++) {\n"
        "        score[i] = from_bfloat16(to_bfloat16(score[i]));\n"
        "      }\n"
        "      Simd::store(scores + r * step + v * Simd::width, score);",
    ),
    ("scores.h", "features of another slice start anew", "first == 0 ? Simd::zero()", "true ? Simd::zero()", "avx512"),
    (
        "scores.h",
        "the mean of what all keys are",
        "Simd::where(Simd::bits(view(j, Simd::width)), Simd::load(scores + j))",
        "Simd::load(scores + j)",
    ),
    ("scores.h", "what a causal head shares costs digits", "? first_key(feature)", "? 0.0f"),
    (
        "scores.h",
        "a hidden key taken from a causal head",
        "selection.by_row || selection.count == 0",
        "selection.count == 0",
    ),
    # decode.h
    ("decode.h", "causal one too far", "query + 1 : p.keys", "query + 2 : p.keys"),
    ("decode.h", "the mask forgotten", "(!mask || mask[key * mask_step])", "true"),
    ("decode.h", "hidden keys counted", "        count++;\n      }", "      }\n      count++;"),
    ("decode.h", "no shift", "- means[r]) + delta", "- means[r])"),
    ("decode.h", "the sign of the values lost", "Simd::mul(rest, Simd::signed_one(x))", "rest"),
    (
        "decode.h",
        "NaN counts as inhibited",
        "shifted < 0.0f ? 0.0f : shifted;  // NaN stays",
        "shifted > 0.0f ? shifted : 0.0f;",
    ),
    (
        "decode.h",
        "heads of a group numbered the other way",
        "query(row % p.queries)",
        "query(p.queries - 1 - row % p.queries)",
    ),
    # driver.cpp
    ("driver.cpp", "only the last chunk is heard", "+= part[step - 1];", "= part[step - 1];"),
    ("driver.cpp", "delta's gradient of one split", "delta += result.delta", "delta = result.delta"),
    ("driver.cpp", "gamma's gradient of one batch", "gamma += result.gamma", "gamma = result.gamma"),
    (
        "driver.cpp",
        "the group's sum is missing",
        "for (int64_t t = 1; t < together; t++)",
        "for (int64_t t = 1; t < splits; t++)",
    ),
    (
        "driver.cpp",
        "the splits' sum is missing",
        "const int64_t together = group * splits;",
        "const int64_t together = group;",
    ),
    (
        "driver.cpp",
        "parts share one partial sum",
        "partial.get() + item * (key_size + value_size)",
        "partial.get() + head * splits * (key_size + value_size)",
    ),
    (
        "threads.h",
        "two threads take one part",
        "shared.next.fetch_add(1)) {",
        "(shared.next = shared.next + 2) - 2) {",
    ),
    (
        "threads.h",
        "the last rows left out",
        "splits = divide(queries, rows);",
        "splits = queries / rows;",
    ),
    (
        "driver.cpp",
        "the last keys of a decode left out",
        "chunks = divide(p.keys, kChunk)",
        "chunks = (p.keys > kChunk ? p.keys / kChunk : 1)",
    ),
    (
        "driver.cpp",
        "the mean of a decode is of one part",
        "      for (int64_t part = head * chunks; part <",
        "      for (int64_t part = (head + 1) * chunks - 1; part <",
    ),
    # simd
    (
        "simd/portable.h",
        "a tie counted as +1",
        "return sub(where(greater(a, zero()), set(1.0f)), where(greater(zero(), a), set(1.0f)));",
        "return signed_one(a);",
    ),
    ("simd/portable.h", "bits of three lanes", "(m[2] & 4) | (m[3] & 8)", "(m[2] & 4)"),
    ("simd/avx512.h", "a tie counted as +1", "0xA9A9A888", "0xA9A9A998", "avx512"),
    ("simd/avx512.h", "not limited below", "_mm512_range_ps(a, z, 0x02)", "_mm512_min_ps(a, z)", "avx512"),
    ("simd/avx512.h", "lanes of the list in another order", "15, 14, 13, 12", "15, 14, 12, 13", "avx512"),
    ("simd/avx2.h", "a tie counted as +1", "_CMP_NEQ_OQ", "_CMP_EQ_OQ", "avx2"),
    (
        "simd/avx2.h",
        "not limited below",
        "_mm256_min_epu32(_mm256_castps_si256(a), low)",
        "_mm256_castps_si256(a)",
        "avx2",
    ),
    ("simd/avx2.h", "not limited above", "_mm256_min_epi32(above, _mm256_castps_si256(z))", "above", "avx2"),
    ("simd/avx2.h", "the upper places of a list are the lower", "<< 8 | i;", "<< 8 | (i & 3);", "avx2"),
    (
        "simd/transpose.h",
        "two rows exchanged",
        "quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE)",
        "quad[i + 1] = _mm256_shuffle_ps(pair[i + 2], pair[i], 0xEE)",
        "avx2",
    ),
]
NAMES = [builds.name_of(row) for row in CATALOGUE]


@pytest.fixture(scope="module")
def found_by(tmp_path_factory) -> builds.Found:
    folder = tmp_path_factory.mktemp("mutants")
    kernels = native.compile_kernels(native.SOURCES, "portable", folder / "portable.o", "-O0")
    drivers = {
        name: native.compile_driver(native.SOURCES, (name,), folder / f"{name}_driver.o", "-O0")
        for name in native.instruction_sets()
    }

    def objects(sources: Path, part: Path, file: str, name: str) -> list[Path]:
        if file in ("driver.cpp", "threads.h"):
            return [native.compile_driver(sources, (), part / "driver.o", "-O0"), kernels]
        mutant = native.compile_kernels(sources, name, part / "kernels.o", "-O0")
        return [drivers[name], mutant] if name == "portable" else [drivers[name], mutant, kernels]

    none = native.link(folder / "none.so", drivers["portable"], kernels)
    return builds.find("tests.ops.compact", folder, CATALOGUE, objects, none)


def test_the_catalogue_has_no_name_twice():
    assert len(set(NAMES)) == len(NAMES) >= 20


def test_the_kernels_themselves_survive(found_by):
    assert found_by["none"] == "survives"


@pytest.mark.parametrize("defect", NAMES)
def test_the_defect_is_found(defect, found_by, record_property):
    record_property("found by", builds.finder(found_by, defect))


def test_a_text_that_left_the_source_is_an_error(tmp_path):
    with pytest.raises(LookupError, match=r"stands 0 times in csrc/rows\.h"):
        builds.mutate(tmp_path / "csrc", "rows.h", "no such text", "")
