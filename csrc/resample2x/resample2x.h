// up:   out[h, w] = x[h / 2, w / 2]
// else: out[h, w] = mean of x[2h, 2w], x[2h, 2w + 1], x[2h + 1, 2w], x[2h + 1, 2w + 1], in float32, rounded once
//
//   x    [N, C, H, W] in NHWC order, float32, bfloat16 or float16; H and W even on the way down
//   out  [N, C, 2H, 2W] or [N, C, H / 2, W / 2], same type and order, apart from x
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void resample2x(const TensorView& x, bool up, const TensorView& out, int threads);

struct ResampleKernels {
  // One row of `width` positions of C channels: out = mean of two rows of 2 * width positions. By type.
  void (*down_row[kFloatTypes])(const char* upper, const char* lower, char* out, int64_t width, int64_t C);
};

namespace baseline {
extern const ResampleKernels kResampleKernels;
}
namespace avx2 {
extern const ResampleKernels kResampleKernels;
}
namespace avx512 {
extern const ResampleKernels kResampleKernels;
}
namespace avx512bf16 {
extern const ResampleKernels kResampleKernels;
}

}  // namespace idm
