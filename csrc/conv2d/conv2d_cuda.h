// The CUDA side of conv2d: the formula of conv2d.h on weights as PyTorch lays them out, float16 or bfloat16.
//
//   weight           [Cout][k][k][C], or with upsample [4][Cout][2][2][C]; shortcut_weight [Cout][Cs]
//   bias, time_shift float32 or x's dtype
//   partials, counts [N, P, 2, Cout] and [P] float32 or null, P = pieces of the plan: a tile of positions of one phase
//   workspace        [splits, N, Ho, Wo, Cout] float32, null where splits is 1
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/tensor_view.h"

namespace idm {

// (tile, splits) that suit a shape, for conv2d_cuda: the largest tile that gives every multiprocessor a block, else the
// smallest and a sum split over blocks. rows, columns: positions of one phase; chunks: of 32 channels, of all sources.
std::array<int64_t, 2> conv2d_cuda_plan(int64_t samples, int64_t phases, int64_t rows, int64_t columns, int64_t cout,
                                        int64_t chunks, int64_t side, int64_t stride);
// Pieces of the statistics of one sample with a tile; raises std::invalid_argument for one that does not exist.
int64_t conv2d_cuda_pieces(int64_t tile, int64_t phases, int64_t rows, int64_t columns);

// Launches on `stream`; raises std::invalid_argument before that.
void conv2d_cuda(const TensorView& x, const TensorView& skip, const TensorView& coefficients, bool silu,
                 const TensorView& weight, int64_t stride, bool upsample, const TensorView& bias,
                 const TensorView& shortcut, const TensorView& shortcut_skip, const TensorView& shortcut_weight,
                 const TensorView& time_shift, const TensorView& residual, const TensorView& out,
                 const TensorView& partials, const TensorView& counts, const TensorView& workspace, int64_t tile,
                 int64_t splits, uint64_t stream);

// The maps of cuda_geometry.h, for tests: "patch", "weight", "column", "pixel", "place", "offset" of five numbers.
int64_t conv2d_cuda_map(const std::string& name, std::array<int64_t, 5> n);

}  // namespace idm
