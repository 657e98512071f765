// threshold[n] = max(1, q-quantile of |k_x * x + k_out * model_output| over sample n): Imagen's dynamic threshold.
//
//   x             [N, C, H, W] in NHWC order, float32
//   model_output  same shape and order, float32, bfloat16 or float16
//   table         [T, 8] float32; k_x, k_out are the first columns of row `step`
//   quantile      in [0, 1]; between two order statistics it is interpolated linearly
//   out           [N] float32
//
// The order statistics are exact. A NaN anywhere in a sample makes its threshold NaN.
#pragma once

#include <cmath>

#include "common/tensor_view.h"

namespace idm {

// Both raise std::invalid_argument before anything is written. `counter`: null, or int64 [1] where the tensors are that
// says the step instead, when the call runs; outside the table it is the nearest row.
void dynamic_threshold(const TensorView& x, const TensorView& model_output, const TensorView& table, int64_t step,
                       const TensorView& counter, double quantile, const TensorView& out, int threads);

void dynamic_threshold_cuda(const TensorView& x, const TensorView& model_output, const TensorView& table, int64_t step,
                            const TensorView& counter, double quantile, const TensorView& out, uint64_t stream);

// Where a quantile lies among `count` sorted values: `weight` of the way from value `low` to the one after it.
struct QuantileRank {
  int64_t low;
  float weight;
};

inline QuantileRank quantile_rank(double quantile, int64_t count) {
  const double rank = quantile * static_cast<double>(count - 1);
  const double low = std::floor(rank);
  return {static_cast<int64_t>(low), static_cast<float>(rank - low)};
}

struct ThresholdKernels {
  // to[i] = the bits of |k_x * x[i] + k_out * model_output[i]|, which order as the values do; by model_output's type
  void (*magnitudes[kFloatTypes])(const float* x, const char* model_output, float k_x, float k_out, uint32_t* to,
                                  int64_t count);
};

namespace baseline {
extern const ThresholdKernels kThresholdKernels;
}
namespace avx2 {
extern const ThresholdKernels kThresholdKernels;
}
namespace avx512 {
extern const ThresholdKernels kThresholdKernels;
}
namespace avx512bf16 {
extern const ThresholdKernels kThresholdKernels;
}

}  // namespace idm
