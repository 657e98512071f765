#include "norm_coefficients/norm_coefficients.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "common/dtype.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr const char* kOp = "norm_coefficients";

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

double element(const TensorView& t, int64_t index) {
  if (t.dtype == DType::kFloat32) return t.as<const float>()[index];
  const uint32_t half = t.as<const uint16_t>()[index];
  if (t.dtype == DType::kBFloat16) return from_bits(half << 16);
  const uint32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude << 13));
  // Exponent and mantissa shifted into place are 2^112 too small, subnormal numbers included.
  return static_cast<double>(from_bits(sign | (magnitude << 13))) * 0x1p112;
}

// [C], or [N, C] with any distance between its rows (the halves of one projection are such slices).
void check_vector(const char* op, const TensorView& t, const char* name, int ndim, int64_t N, int64_t C) {
  if (!t) return;
  const bool ok = t.ndim == ndim && is_float(t) && t.shape[ndim - 1] == C && (C == 1 || t.stride[ndim - 1] == 1) &&
                  (ndim == 1 || t.shape[0] == N);
  require(ok, op, std::string(name) + " must be a float tensor of the contract's shape with dense rows");
}

}  // namespace

void check_affine(const char* op, const AffineParams& affine, int64_t groups, int64_t N, int64_t C) {
  require(groups > 0 && C % groups == 0, op, "num_groups must divide the channels");
  require(static_cast<bool>(affine.scale) == static_cast<bool>(affine.shift), op,
          "scale and shift must be given together");
  check_vector(op, affine.weight, "weight", 1, N, C);
  check_vector(op, affine.bias, "bias", 1, N, C);
  check_vector(op, affine.scale, "scale", 2, N, C);
  check_vector(op, affine.shift, "shift", 2, N, C);
}

void check_stats(const char* op, const char* name, const TensorView& partials, const TensorView& counts, int64_t N,
                 int64_t C) {
  const bool ok = partials.ndim == 4 && partials.dtype == DType::kFloat32 && is_contiguous(partials) &&
                  partials.shape[0] == N && partials.shape[1] > 0 && partials.shape[2] == 2 && partials.shape[3] == C &&
                  counts.ndim == 1 && counts.dtype == DType::kFloat32 && is_contiguous(counts) &&
                  counts.shape[0] == partials.shape[1];
  require(ok, op, std::string(name) + " must be contiguous float32 [N, P, 2, C] and [P]");
}

void coefficients_of(const double* mean, const double* m2, double rows, int64_t C, int64_t groups,
                     const AffineParams& affine, int64_t sample, double eps, float* out) {
  const int64_t width = C / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double centre = 0.0, squares = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) centre += mean[c];
    centre /= static_cast<double>(width);
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      squares += m2[c] + (mean[c] - centre) * (mean[c] - centre) * rows;
    const double rstd = 1.0 / std::sqrt(squares / (rows * static_cast<double>(width)) + eps);
    const float rounded = static_cast<float>(centre);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      double gain = affine.weight ? element(affine.weight, c) : 1.0;
      double offset = affine.bias ? element(affine.bias, c) : 0.0;
      if (affine.scale) {
        const double factor = 1.0 + element(affine.scale, sample * affine.scale.stride[0] + c);
        gain *= factor;
        offset = offset * factor + element(affine.shift, sample * affine.shift.stride[0] + c);
      }
      gain *= rstd;
      out[c] = rounded;
      out[C + c] = static_cast<float>(gain);
      out[2 * C + c] = static_cast<float>(offset + (rounded - centre) * gain);  // what rounding the mean left out
    }
  }
}

void norm_coefficients(const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                       const TensorView& skip_counts, const TensorView& weight, const TensorView& bias,
                       const TensorView& scale, const TensorView& shift, int64_t groups, double eps,
                       const TensorView& out, int threads) {
  const int64_t N = partials.shape[0], C1 = partials.shape[3], C2 = skip_partials ? skip_partials.shape[3] : 0;
  const int64_t C = C1 + C2;
  check_stats(kOp, "stats", partials, counts, N, C1);
  if (skip_partials) check_stats(kOp, "skip_stats", skip_partials, skip_counts, N, C2);
  const AffineParams affine{weight, bias, scale, shift};
  check_affine(kOp, affine, groups, N, C);
  require(out.ndim == 3 && out.dtype == DType::kFloat32 && is_contiguous(out) && out.shape[0] == N &&
              out.shape[1] == 3 && out.shape[2] == C,
          kOp, "out must be contiguous float32 [N, 3, C]");

  threads = std::max(threads, 1);
  thread_local std::vector<double> room;
  if (static_cast<int64_t>(room.size()) < threads * 2 * C) room.resize(threads * 2 * C);
  double* scratch = room.data();
  auto sample = [&](int64_t n, int worker) {
    double *mean = scratch + worker * 2 * C, *m2 = mean + C;
    const int64_t P1 = partials.shape[1];
    const double rows = merge_pieces(partials.as<const float>() + n * P1 * 2 * C1, counts.as<const float>(), P1, C1,
                                     mean, m2);
    if (skip_partials) {
      const int64_t P2 = skip_partials.shape[1];
      merge_pieces(skip_partials.as<const float>() + n * P2 * 2 * C2, skip_counts.as<const float>(), P2, C2, mean + C1,
                   m2 + C1);
    }
    coefficients_of(mean, m2, rows, C, groups, affine, n, eps, out.as<float>() + n * 3 * C);
  };
  parallel_for(N, threads, sample);
}

}  // namespace idm
