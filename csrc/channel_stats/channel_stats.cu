// A block takes one piece and a tile of channels; its threads are `lanes` vectors wide and the rest rows deep.
#include "channel_stats/channel_stats.h"

#include "channel_stats/contract.h"
#include "channel_stats/moments.cuh"
#include "common/cuda.h"

namespace idm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kMostColumns = 64;

struct StatsArgs {
  float* partials;  // [N, P, 2, C]
  float* counts;    // [P]
  int64_t rows, channels, piece_rows, pieces;
  int lanes;  // vectors side by side, a power of two up to 32
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) stats_kernel(const T* x, StatsArgs a) {
  __shared__ float means[kWarps][kMostColumns], squares[kWarps][kMostColumns], counts[kWarps];
  __shared__ float pivots[kMostColumns];
  const int64_t n = blockIdx.x / a.pieces, piece = blockIdx.x - n * a.pieces;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, columns = a.lanes * V;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * a.lanes + threadIdx.x % a.lanes) * V;
  const int64_t first = piece * a.piece_rows, last = min(first + a.piece_rows, a.rows);
  float pivot[V] = {}, mean[V] = {}, m2[V] = {}, count = 0.0f;  // means less pivot
  if (c < a.channels) {
    const T* source = x + n * a.rows * a.channels + c;
    Vector<T, V> values[3];
    values[0].load(source + first * a.channels);
    values[1].load(source + (first + last) / 2 * a.channels);
    values[2].load(source + (last - 1) * a.channels);
#pragma unroll
    for (int k = 0; k < V; ++k) {  // the median: an outlier in one of them is none
      const float low = to_float(values[0].lanes[k]), high = to_float(values[1].lanes[k]);
      pivot[k] = fmaxf(fminf(low, high), fminf(fmaxf(low, high), to_float(values[2].lanes[k])));
    }
    count = row_moments<T, V>(source, a.channels, first + threadIdx.x / a.lanes, last, kThreads / a.lanes, pivot, mean, m2);
  }
  for (int away = a.lanes; away < kWarp; away *= 2) {
    const MergeShare share(count, __shfl_xor_sync(kFullMask, count, away));
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float other_mean = __shfl_xor_sync(kFullMask, mean[k], away);
      const float other_m2 = __shfl_xor_sync(kFullMask, m2[k], away);
      share(mean[k], m2[k], other_mean, other_m2);
    }
    count = share.total;
  }
  if (lane < a.lanes) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      means[warp][lane * V + k] = mean[k];
      squares[warp][lane * V + k] = m2[k];
      if (warp == 0) pivots[lane * V + k] = pivot[k];
    }
    if (lane == 0) counts[warp] = count;
  }
  __syncthreads();
  const int64_t column = static_cast<int64_t>(blockIdx.y) * columns + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < columns && column < a.channels) {
    Moments all{counts[0], means[0][threadIdx.x], squares[0][threadIdx.x]};
    for (int w = 1; w < kWarps; ++w) merge(all, {counts[w], means[w][threadIdx.x], squares[w][threadIdx.x]});
    float* target = a.partials + static_cast<int64_t>(blockIdx.x) * 2 * a.channels + column;
    target[0] = pivots[threadIdx.x] + all.mean;
    target[a.channels] = all.m2;
    if (n == 0 && column == 0) a.counts[piece] = static_cast<float>(last - first);
  }
}

template <class T, int V>
void run(const TensorView& x, StatsArgs a, uint64_t stream) {
  // The widest tile with which the blocks still fill the device; 32 bytes are the least that memory reads.
  const int64_t blocks = x.shape[0] * a.pieces, least = V == 1 ? 8 : 2, want = multiprocessors();
  const auto tiles = [&](int64_t lanes) { return (a.channels + lanes * V - 1) / (lanes * V); };
  int64_t lanes = V == 1 ? 32 : kMostColumns / V;
  while (lanes > least && (lanes * V >= 2 * a.channels || blocks * tiles(lanes) < want)) lanes /= 2;
  a.lanes = static_cast<int>(lanes);
  require(blocks <= 0x7fffffffLL && tiles(lanes) <= 65535, "channel_stats", "x must have fewer pieces and channels");
  launch(stats_kernel<T, V>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles(lanes))), dim3(kThreads), 0,
         stream, x.as<const T>(), a);
}

}  // namespace

void channel_stats_cuda(const TensorView& x, const TensorView& partials, const TensorView& counts, int64_t piece_rows,
                        uint64_t stream) {
  check_channel_stats(x, partials, counts, piece_rows);
  StatsArgs a{};
  a.partials = partials.as<float>();
  a.counts = counts.as<float>();
  a.rows = x.shape[2] * x.shape[3];
  a.channels = x.shape[1];
  a.piece_rows = piece_rows;
  a.pieces = counts.shape[0];
  visit_float(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.channels % kVector<T> == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0)
      run<T, kVector<T>>(x, a, stream);
    else
      run<T, 1>(x, a, stream);
  });
}

}  // namespace idm
