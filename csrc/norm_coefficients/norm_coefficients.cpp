#include "norm_coefficients/norm_coefficients.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/threads.h"
#include "norm_coefficients/contract.h"

namespace idm {
namespace {

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

}  // namespace

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
  const AffineParams affine{weight, bias, scale, shift};
  check_norm_coefficients(partials, counts, skip_partials, skip_counts, affine, groups, out);
  const int64_t N = partials.shape[0], C1 = partials.shape[3], C2 = skip_partials ? skip_partials.shape[3] : 0;
  const int64_t C = C1 + C2;
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
