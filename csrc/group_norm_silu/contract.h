// What group_norm_silu asks of its arguments, on the CPU and on a device. Not for *_isa.cpp files.
#pragma once

#include "norm_coefficients/contract.h"

namespace idm {

inline void check_group_norm_silu(const TensorView& x, const TensorView& out, const AffineParams& affine,
                                  const TensorView& skip, const TensorView& partials, const TensorView& counts,
                                  const TensorView& skip_partials, const TensorView& skip_counts, int64_t groups) {
  constexpr const char* kOp = "group_norm_silu";
  require(x.ndim == 4 && is_float(x) && is_nhwc(x), kOp, "x must be a float tensor in NHWC order");
  TensorView all = x;
  if (skip) {
    require(skip.ndim == 4 && skip.dtype == x.dtype && is_nhwc(skip), kOp, "skip must be of x's dtype and order");
    all.shape[1] += skip.shape[1];
    TensorView as_x = skip;
    as_x.shape[1] = x.shape[1];
    require(same_shape(as_x, x), kOp, "skip must be of x's shape but for its channels");
    require(out.data != x.data && out.data != skip.data, kOp, "out must be apart from x and skip");
  }
  require(same_shape(all, out) && out.dtype == x.dtype && is_nhwc(out), kOp, "out must be as x (and skip)");
  check_affine(kOp, affine, groups, x.shape[0], all.shape[1]);
  if (partials) check_stats(kOp, "stats", partials, counts, x.shape[0], x.shape[1]);
  require(skip || !skip_partials, kOp, "skip_stats must come with skip");
  if (skip_partials) check_stats(kOp, "skip_stats", skip_partials, skip_counts, x.shape[0], skip.shape[1]);
}

}  // namespace idm
