// What the CPU and the CUDA side of dynamic_threshold check alike.
#pragma once

#include "common/checks.h"

namespace idm {

inline void check_dynamic_threshold(const TensorView& x, const TensorView& model_output, const TensorView& table,
                                    int64_t step, double quantile, const TensorView& out) {
  constexpr const char* kOp = "dynamic_threshold";
  require(x.ndim == 4 && x.dtype == DType::kFloat32 && is_nhwc(x), kOp, "x must be a float32 tensor in NHWC order");
  require(same_shape(x, model_output) && is_float(model_output) && is_nhwc(model_output), kOp,
          "model_output must be a float tensor of x's shape in NHWC order");
  require(x.numel() == 0 || (x && model_output), kOp, "x and model_output must be given");
  require(table && table.ndim == 2 && table.shape[1] == 8 && table.dtype == DType::kFloat32 && is_contiguous(table), kOp,
          "table must be float32 [T, 8]");
  require(step >= 0 && step < table.shape[0], kOp, "step must be a row of table");
  require(quantile >= 0 && quantile <= 1, kOp, "quantile must lie in [0, 1]");
  require(out && out.ndim == 1 && out.dtype == DType::kFloat32 && out.shape[0] == x.shape[0] && is_contiguous(out), kOp,
          "out must be float32 [N]");
}

}  // namespace idm
