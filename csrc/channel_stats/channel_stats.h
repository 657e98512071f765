// Per channel mean and sum of squared differences (M2) of pieces of an image's positions.
//
//   x         [N, C, H, W] in NHWC order, one of float32, bfloat16, float16
//   partials  float32 [N, P, 2, C]: (mean, M2) of piece p, which is `piece_rows` positions, the last piece fewer
//   counts    float32 [P]: positions in each piece
//
// Shifted float32 sums over at most 256 rows, merged in double by Chan's formula; the same bits for every number of
// threads. A NaN stays in its channel.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void channel_stats(const TensorView& x, const TensorView& partials, const TensorView& counts, int64_t piece_rows,
                   int threads);

void channel_stats_cuda(const TensorView& x, const TensorView& partials, const TensorView& counts, int64_t piece_rows,
                        uint64_t stream);

struct ChannelStatsKernels {
  // Mean and M2 [C] of `rows` rows of `channels` at x.
  void (*block[kFloatTypes])(const char* x, int64_t rows, int64_t channels, double* mean, double* m2);
};

// The table in use.
const ChannelStatsKernels& channel_stats_kernels();

namespace baseline {
extern const ChannelStatsKernels kChannelStatsKernels;
}
namespace avx2 {
extern const ChannelStatsKernels kChannelStatsKernels;
}
namespace avx512 {
extern const ChannelStatsKernels kChannelStatsKernels;
}
namespace avx512bf16 {
extern const ChannelStatsKernels kChannelStatsKernels;
}

}  // namespace idm
