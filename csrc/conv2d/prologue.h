// What a convolution does to an activation before the product. Included by *_isa.cpp only.
#pragma once

#include "common/simd.h"
#include "common/vector_math.h"

namespace idm {
namespace IDM_ISA {

enum class Prologue { kNone, kAffine, kSilu };

// coarse: what suffices for a result of 8 bits of precision or fewer.
template <bool coarse, Prologue kind>
inline vf prologue(vf x, vf centre, vf gain, vf offset) {
  if (kind == Prologue::kNone) return x;
  const vf y = (x - centre) * gain + offset;
  return kind == Prologue::kSilu ? silu<coarse>(y) : y;
}

}  // namespace IDM_ISA
}  // namespace idm
