// Compiled once for every instruction set: INHIBITOR_SIMD names its header, INHIBITOR_KERNELS the function that
// hands the kernels out. Nothing in here may have external linkage but that function: the linker would pick one
// build's copy for all.
#include INHIBITOR_SIMD

#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "kernels.h"

namespace {

size_t forward_bytes(const Problem& p) {
  Arena arena{nullptr};
  ForwardMemory memory(p, arena);
  return arena.used;
}

size_t backward_bytes(const Problem& p) {
  Arena arena{nullptr};
  BackwardMemory memory(p, arena);
  return arena.used;
}

size_t decode_bytes(const Problem& p) {
  Arena arena{nullptr};
  DecodeMemory memory(p, arena);
  return arena.used;
}

const Kernels kernels = {
    Simd::name, forward_bytes, forward_part,  backward_bytes, backward_part,
    write_row,  decode_bytes,  decode_scores, decode_values,  decode_step,
};

}  // namespace

const Kernels* INHIBITOR_KERNELS() { return &kernels; }
