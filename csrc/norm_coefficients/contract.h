// What norm_coefficients asks of its arguments, and group_norm_silu of the same ones, on the CPU and on a device.
#pragma once

#include <string>

#include "common/checks.h"
#include "norm_coefficients/norm_coefficients.h"

namespace idm {

// [C], or [N, C] with any distance between its rows (the halves of one projection are such slices).
inline void check_vector(const char* op, const TensorView& t, const char* name, int ndim, int64_t N, int64_t C) {
  if (!t) return;
  const bool ok = t.ndim == ndim && is_float(t) && t.shape[ndim - 1] == C && (C == 1 || t.stride[ndim - 1] == 1) &&
                  (ndim == 1 || t.shape[0] == N);
  require(ok, op, std::string(name) + " must be a float tensor of the contract's shape with dense rows");
}

// weight and bias of [C], scale and shift of [N, C], for the operation that names itself.
inline void check_affine(const char* op, const AffineParams& affine, int64_t groups, int64_t N, int64_t C) {
  require(groups > 0 && C % groups == 0, op, "num_groups must divide the channels");
  require(static_cast<bool>(affine.scale) == static_cast<bool>(affine.shift), op,
          "scale and shift must be given together");
  check_vector(op, affine.weight, "weight", 1, N, C);
  check_vector(op, affine.bias, "bias", 1, N, C);
  check_vector(op, affine.scale, "scale", 2, N, C);
  check_vector(op, affine.shift, "shift", 2, N, C);
}

// Refuses what is not statistics of [N, C, H, W].
inline void check_stats(const char* op, const char* name, const TensorView& partials, const TensorView& counts, int64_t N,
                 int64_t C) {
  const bool ok = partials.ndim == 4 && partials.dtype == DType::kFloat32 && is_contiguous(partials) &&
                  partials.shape[0] == N && partials.shape[1] > 0 && partials.shape[2] == 2 && partials.shape[3] == C &&
                  counts.ndim == 1 && counts.dtype == DType::kFloat32 && is_contiguous(counts) &&
                  counts.shape[0] == partials.shape[1];
  require(ok, op, std::string(name) + " must be contiguous float32 [N, P, 2, C] and [P]");
}

inline void check_norm_coefficients(const TensorView& partials, const TensorView& counts,
                                    const TensorView& skip_partials, const TensorView& skip_counts,
                                    const AffineParams& affine, int64_t groups, const TensorView& out) {
  constexpr const char* kOp = "norm_coefficients";
  const int64_t N = partials.shape[0], C1 = partials.shape[3], C2 = skip_partials ? skip_partials.shape[3] : 0;
  check_stats(kOp, "stats", partials, counts, N, C1);
  if (skip_partials) check_stats(kOp, "skip_stats", skip_partials, skip_counts, N, C2);
  check_affine(kOp, affine, groups, N, C1 + C2);
  require(out.ndim == 3 && out.dtype == DType::kFloat32 && is_contiguous(out) && out.shape[0] == N &&
              out.shape[1] == 3 && out.shape[2] == C1 + C2,
          kOp, "out must be contiguous float32 [N, 3, C]");
}

}  // namespace idm
