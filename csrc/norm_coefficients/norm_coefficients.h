// Statistics of channels -> (centre, gain, offset): (x - centre) * gain + offset is group norm with its parameters.
//
//   stats, skip   partials float32 [N, P, 2, C1 or C2] and counts [P] of one or two tensors that lie side by side
//   weight, bias  [C] or null, scale, shift [N, C] or null; rows dense, each of float32, bfloat16 or float16
//   out           float32 [N, 3, C], C = C1 + C2; groups divides C and may straddle the seam
//
// Merged in double, in index order.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void norm_coefficients(const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                       const TensorView& skip_counts, const TensorView& weight, const TensorView& bias,
                       const TensorView& scale, const TensorView& shift, int64_t groups, double eps,
                       const TensorView& out, int threads);

void norm_coefficients_cuda(const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                            const TensorView& skip_counts, const TensorView& weight, const TensorView& bias,
                            const TensorView& scale, const TensorView& shift, int64_t groups, double eps,
                            const TensorView& out, uint64_t stream);

struct AffineParams {
  TensorView weight, bias, scale, shift;
};

// Pieces [P][2][C] of one sample merged into mean and M2 [C] by two passes; `counts` are the positions of each piece.
// Returns their sum.
template <class T, class Counts>
double merge_pieces(const T* partials, const Counts* counts, int64_t pieces, int64_t C, double* mean, double* m2) {
  double total = 0.0;
  for (int64_t p = 0; p < pieces; ++p) total += static_cast<double>(counts[p]);
  for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0.0;
  for (int64_t p = 0; p < pieces; ++p) {
    const double share = static_cast<double>(counts[p]) / total;
    for (int64_t c = 0; c < C; ++c) mean[c] += partials[p * 2 * C + c] * share;
  }
  for (int64_t p = 0; p < pieces; ++p) {
    const double count = static_cast<double>(counts[p]);
    for (int64_t c = 0; c < C; ++c) {
      const double delta = partials[p * 2 * C + c] - mean[c];
      m2[c] += partials[(p * 2 + 1) * C + c] + delta * delta * count;
    }
  }
  return total;
}

// Coefficients [3][C] of one sample from mean and M2 [C] over `rows` positions.
void coefficients_of(const double* mean, const double* m2, double rows, int64_t C, int64_t groups,
                     const AffineParams& affine, int64_t sample, double eps, float* out);

}  // namespace idm
