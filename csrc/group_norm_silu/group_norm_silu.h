// y = silu((x - mean_g) * rstd_g * weight + bias), optionally with (1 + scale) and shift per sample and channel.
//
//   x              [N, C1, H, W] in NHWC order, one of float32, bfloat16, float16
//   skip           [N, C2, H, W] as x, or null: the result is that of the two side by side, C = C1 + C2 channels
//   out            [N, C, H, W] as x; may be x itself where there is no skip
//   weight, bias   [C] or null, scale, shift [N, C] or null; rows dense, each of any of the three types
//   partials, counts, skip_partials, skip_counts   statistics of x and of skip (channel_stats.h), or null: made here
//   groups         divides C; statistics over the C / groups channels and H * W positions of one sample
//
// The result is the same bits for every number of threads.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void group_norm_silu(const TensorView& x, const TensorView& out, const TensorView& weight, const TensorView& bias,
                     const TensorView& scale, const TensorView& shift, const TensorView& skip,
                     const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                     const TensorView& skip_counts, int64_t groups, double eps, bool silu, int threads);

// table: float32 [N, 3, C] of norm_coefficients, or null: made from the statistics, or where none is given and the image
// is small (group_norm_silu_cuda_alone) from x itself. Both or none of x and skip have statistics.
void group_norm_silu_cuda(const TensorView& x, const TensorView& out, const TensorView& weight, const TensorView& bias,
                          const TensorView& scale, const TensorView& shift, const TensorView& skip,
                          const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                          const TensorView& skip_counts, const TensorView& table, int64_t groups, double eps, bool silu,
                          uint64_t stream);

struct GroupNormKernels {
  // Turns rows (centre, gain, offset), row_stride apart, into the form that apply takes.
  void (*arrange[kFloatTypes])(float* table, int64_t channels, int64_t row_stride, bool silu);
  // out = silu((x - centre) * gain + offset) for `rows` rows of `channels`; rows of out are out_stride elements apart,
  // rows of the arranged table are row_stride apart. `stream`: x comes from memory and out goes there, past the caches.
  void (*apply[kFloatTypes])(const char* x, char* out, int64_t rows, int64_t channels, int64_t out_stride,
                             const float* table, int64_t row_stride, bool silu, bool stream);
};

namespace baseline {
extern const GroupNormKernels kGroupNormKernels;
}
namespace avx2 {
extern const GroupNormKernels kGroupNormKernels;
}
namespace avx512 {
extern const GroupNormKernels kGroupNormKernels;
}
namespace avx512bf16 {
extern const GroupNormKernels kGroupNormKernels;
}

}  // namespace idm
