#include "channel_stats/channel_stats.h"

#include <algorithm>
#include <vector>

#include "channel_stats/contract.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
const ChannelStatsKernels& channel_stats_kernels() {
  static constexpr const ChannelStatsKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kChannelStatsKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

void channel_stats(const TensorView& x, const TensorView& partials, const TensorView& counts, int64_t piece_rows,
                   int threads) {
  check_channel_stats(x, partials, counts, piece_rows);
  const int64_t N = x.shape[0], C = x.shape[1], rows = x.shape[2] * x.shape[3], pieces = counts.shape[0];
  auto rows_of = [&](int64_t p) { return std::min(piece_rows, rows - p * piece_rows); };
  for (int64_t p = 0; p < pieces; ++p) counts.as<float>()[p] = static_cast<float>(rows_of(p));

  threads = std::max(threads, 1);
  const auto block = channel_stats_kernels().block[static_cast<int>(x.dtype)];
  const int64_t row_bytes = C * element_size(x.dtype);
  thread_local std::vector<double> room;
  if (static_cast<int64_t>(room.size()) < threads * 2 * C) room.resize(threads * 2 * C);
  double* scratch = room.data();
  auto piece = [&](int64_t task, int worker) {
    const int64_t n = task / pieces, p = task % pieces;
    double* mean = scratch + worker * 2 * C;
    block(x.data + (n * rows + p * piece_rows) * row_bytes, rows_of(p), C, mean, mean + C);
    float* target = partials.as<float>() + task * 2 * C;
    for (int64_t c = 0; c < 2 * C; ++c) target[c] = static_cast<float>(mean[c]);
  };
  parallel_for(N * pieces, threads, piece);
}

}  // namespace idm
