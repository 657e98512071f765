// y = silu((x - mean_g) * rstd_g * weight + bias), optionally with (1 + scale) and shift per sample and channel.
//
//   x, out         [N, C, H, W] in NHWC order, one of float32, bfloat16, float16; out may be x itself
//   weight, bias   [C] or null, scale, shift [N, C] or null; rows dense, each of any of the three types
//   groups         divides C; statistics over the C / groups channels and H * W positions of one sample
//
// Statistics: shifted float32 sums over short pieces, pieces and channels merged in double by Chan's formula in an order
// that depends on the shape alone. The result is the same bits for every number of threads.
#pragma once

#include "common/tensor_view.h"

namespace idm {

struct AffineParams {
  TensorView weight, bias, scale, shift;
};

// Raises std::invalid_argument before anything is written.
void group_norm_silu(const TensorView& x, const TensorView& out, const TensorView& weight, const TensorView& bias,
                     const TensorView& scale, const TensorView& shift, int64_t groups, double eps, bool silu,
                     int threads);

// What one sample looks like to the kernels, and how it is cut: `blocks` pieces of block_rows rows (the last shorter).
struct GroupNormShape {
  int64_t channels, rows, groups, blocks, block_rows;
};

// Per channel of one block. `n` is a count of rows.
struct BlockStats {
  double* mean;  // [C]
  double* m2;    // [C] sum of squared differences from mean
};

struct GroupNormKernels {
  // Statistics of `rows` rows at x.
  void (*block_stats[kFloatTypes])(const char* x, int64_t rows, int64_t channels, BlockStats out);
  // stats: [blocks][2][C]. coefficients: [3][C] float32 (centre, gain, offset): y = (x - centre) * gain + offset.
  void (*coefficients)(const GroupNormShape& shape, const double* stats, const AffineParams& affine, int64_t sample,
                       double eps, double* scratch, float* coefficients);
  void (*apply[kFloatTypes])(const char* x, char* out, int64_t rows, int64_t channels, const float* coefficients,
                             bool silu);
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
