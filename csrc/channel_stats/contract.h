// What channel_stats asks of its arguments, on the CPU and on a device. Not for *_isa.cpp files.
#pragma once

#include "common/checks.h"

namespace idm {

inline void check_channel_stats(const TensorView& x, const TensorView& partials, const TensorView& counts,
                                int64_t piece_rows) {
  constexpr const char* kOp = "channel_stats";
  require(x.ndim == 4 && is_float(x) && is_nhwc(x), kOp, "x must be a float tensor in NHWC order");
  require(x.numel() > 0 && piece_rows > 0, kOp, "x must have elements and a piece rows");
  const int64_t pieces = (x.shape[2] * x.shape[3] + piece_rows - 1) / piece_rows;
  require(partials.ndim == 4 && partials.dtype == DType::kFloat32 && is_contiguous(partials) &&
              partials.shape[0] == x.shape[0] && partials.shape[1] == pieces && partials.shape[2] == 2 &&
              partials.shape[3] == x.shape[1],
          kOp, "partials must be contiguous float32 [N, P, 2, C]");
  require(counts.ndim == 1 && counts.dtype == DType::kFloat32 && is_contiguous(counts) && counts.shape[0] == pieces,
          kOp, "counts must be contiguous float32 [P]");
}

}  // namespace idm
