// The vector code of channel_stats; compiled once per instruction set.
#include "channel_stats/channel_stats.h"
#include "common/simd.h"

namespace idm {
namespace IDM_ISA {
namespace {

constexpr int64_t kFirstPiece = 16, kPieceGrowth = 4, kLargestPiece = 256;  // rows
constexpr int64_t kChain = 16;  // rows added one after the other; sums of sums keep the rounding small
constexpr int64_t kAhead = 16 * 1024;  // bytes

// Sums of differences from a shift, in float32, over pieces of rows; pieces merge in double. The first, short piece is
// read twice: its own mean is its shift. Later ones take the mean of all before them. Should that be far off (by D),
// the loss by cancellation is about eps * n * D^2, n rows in the piece; the step itself adds at least D^2 * n / 5 to
// the sum of squares, because a piece is at most four times what came before. So the relative error stays near eps.

struct Merge {  // of a piece of `rows` rows into the statistics of `seen` rows before it
  double rows, per_row, share, cross;
  Merge(int64_t count, int64_t seen)
      : rows(static_cast<double>(count)),
        per_row(1.0 / rows),
        share(rows / (static_cast<double>(seen) + rows)),
        cross(static_cast<double>(seen) * share) {}
  void operator()(double shift, double sum, double squares, double* mean, double* m2) const {
    const double piece_mean = shift + sum * per_row;
    const double piece_m2 = squares - sum * sum * per_row;
    const double delta = piece_mean - *mean;
    *mean += delta * share;
    *m2 += (piece_m2 < 0.0 ? 0.0 : piece_m2) + delta * delta * cross;
  }
};

// K pairs of vectors of a row. Statistics lie in the order of lanes until a block is done.
template <class T, int K>
struct Pairs {
  static constexpr int kVectors = 2 * K;
  static void read(const T* x, int, vf* v) {
    // The hardware's own prefetch reaches two thirds of the bandwidth from memory that this one does.
    for (int k = 0; k < K; ++k) __builtin_prefetch(reinterpret_cast<const char*>(x + k * 2 * kWidth) + kAhead);
    for (int k = 0; k < K; ++k) load_pair(x + k * 2 * kWidth, v + 2 * k, v + 2 * k + 1);
  }
  static void finish(double* values) {
    if (!kIsBf16<T>) return;
    double lanes[2 * kWidth];
    for (int k = 0; k < K; ++k, values += 2 * kWidth) {
      std::memcpy(lanes, values, sizeof lanes);
      for (int i = 0; i < 2 * kWidth; ++i) values[element_of_lane<T>(i)] = lanes[i];
    }
  }
};

// What is left of a row: one vector, of which `count` lanes exist.
template <class T>
struct Rest {
  static constexpr int kVectors = 1;
  static void read(const T* x, int count, vf* v) { *v = count == kWidth ? load(x) : load_partial(x, count); }
  static void finish(double*) {}
};

template <class T, class Layout>
void piece_stats(const T* x, int64_t rows, int64_t stride, int count, int64_t seen, double* mean, double* m2) {
  constexpr int V = Layout::kVectors;
  vf shift[V] = {}, sum[V] = {}, squares[V] = {}, v[V];
  float shifts[V * kWidth] = {}, sums[V * kWidth], square_sums[V * kWidth];
  if (seen == 0) {
    for (int64_t r = 0; r < rows; ++r) {
      Layout::read(x + r * stride, count, v);
      for (int k = 0; k < V; ++k) shift[k] += v[k];
    }
    for (int k = 0; k < V; ++k) shift[k] *= 1.0f / static_cast<float>(rows);
    std::memcpy(shifts, shift, sizeof shift);
  } else {
    for (int lane = 0; lane < count; ++lane) shifts[lane] = static_cast<float>(mean[lane]);
    std::memcpy(shift, shifts, sizeof shift);
  }
  for (int64_t first = 0; first < rows; first += kChain) {
    vf few[V] = {}, few_squares[V] = {};
    for (int64_t r = first; r < (first + kChain < rows ? first + kChain : rows); ++r) {
      Layout::read(x + r * stride, count, v);
      for (int k = 0; k < V; ++k) {
        const vf d = v[k] - shift[k];
        few[k] += d;
        few_squares[k] += d * d;
      }
    }
    for (int k = 0; k < V; ++k) {
      sum[k] += few[k];
      squares[k] += few_squares[k];
    }
  }
  std::memcpy(sums, sum, sizeof sum);
  std::memcpy(square_sums, squares, sizeof squares);
  const Merge merge(rows, seen);
  for (int lane = 0; lane < count; ++lane) merge(shifts[lane], sums[lane], square_sums[lane], mean + lane, m2 + lane);
}

template <class T, class Layout>
void column_stats(const T* x, int64_t rows, int64_t stride, int count, double* mean, double* m2) {
  int64_t piece = kFirstPiece;
  for (int64_t first = 0; first < rows;) {
    const int64_t left = rows - first, n = left <= piece + piece / 2 ? left : piece;
    piece_stats<T, Layout>(x + first * stride, n, stride, count, first, mean, m2);
    first += n;
    piece = piece * kPieceGrowth < kLargestPiece ? piece * kPieceGrowth : kLargestPiece;
  }
  Layout::finish(mean);
  Layout::finish(m2);
}

template <class T>
void block(const char* data, int64_t rows, int64_t channels, double* mean, double* m2) {
  const T* x = reinterpret_cast<const T*>(data);
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0.0;
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth)
    column_stats<T, Pairs<T, 2>>(x + c, rows, channels, 4 * kWidth, mean + c, m2 + c);
  for (; c + 2 * kWidth <= channels; c += 2 * kWidth)
    column_stats<T, Pairs<T, 1>>(x + c, rows, channels, 2 * kWidth, mean + c, m2 + c);
  for (; c < channels; c += kWidth) {
    const int count = channels - c < kWidth ? static_cast<int>(channels - c) : kWidth;
    column_stats<T, Rest<T>>(x + c, rows, channels, count, mean + c, m2 + c);
  }
}

}  // namespace

extern const ChannelStatsKernels kChannelStatsKernels = {{block<float>, block<bf16>, block<fp16>}};

}  // namespace IDM_ISA
}  // namespace idm
