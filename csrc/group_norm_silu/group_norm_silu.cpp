#include "group_norm_silu/group_norm_silu.h"

#include <algorithm>
#include <vector>

#include "channel_stats/channel_stats.h"
#include "common/cpu_isa.h"
#include "common/threads.h"
#include "group_norm_silu/contract.h"
#include "norm_coefficients/norm_coefficients.h"

namespace idm {
namespace {

constexpr int64_t kBlockBytes = 32 * 1024;
constexpr int64_t kMaxBlocks = 32;
// Results from this size on bypass the caches: they would not be there any more when they are read, and to write a line
// the usual way is to read it first. From half of it on the two ways are equal, the reading of the result included.
constexpr int64_t kStreamBytes = 8 * 1024 * 1024;
constexpr int64_t kLeastRows = 128;  // of a block: the statistics of each cost some rows of time by themselves

const GroupNormKernels& kernels() {
  static constexpr const GroupNormKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kGroupNormKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

// One of the tensors that lie side by side, and its statistics where the caller has them.
struct Part {
  const char* data;
  int64_t channels, first;  // `first`: its place among all channels
  TensorView partials, counts;
};

// How a sample is cut depends on its shape alone, never on the number of threads.
struct Cut {
  int64_t rows, blocks, block_rows;
  Cut(int64_t all_rows, int64_t row_bytes) : rows(all_rows) {
    const int64_t most = std::clamp<int64_t>(rows / kLeastRows, 1, kMaxBlocks);
    const int64_t wanted = std::clamp<int64_t>(rows * row_bytes / kBlockBytes, 1, most);
    block_rows = (rows + wanted - 1) / wanted;
    blocks = (rows + block_rows - 1) / block_rows;
  }
  int64_t rows_of(int64_t block) const { return std::min(block_rows, rows - block * block_rows); }
};

// Working memory of the calling thread, kept between calls: partial statistics and coefficients, no tensor.
struct Workspace {
  std::vector<double> doubles;
  std::vector<float> floats;
};

Workspace& workspace(int64_t doubles, int64_t floats) {
  thread_local Workspace w;
  if (static_cast<int64_t>(w.doubles.size()) < doubles) w.doubles.resize(doubles);
  if (static_cast<int64_t>(w.floats.size()) < floats) w.floats.resize(floats);
  return w;
}

// The work on one sample, or one block of it. `stats`: [blocks][2][channels] of each part in turn.
struct Work {
  std::vector<Part> parts;
  Cut cut;
  AffineParams affine;
  char* out;
  int64_t channels, groups, element;
  DType dtype;
  double eps;
  bool silu, stream, measured = true;  // statistics of every part are given

  int64_t stats_size() const { return cut.blocks * 2 * channels; }
  int64_t scratch_size() const { return 2 * channels + cut.blocks; }

  void measure(int64_t n, int64_t block, double* stats) const {
    const auto kernel = channel_stats_kernels().block[static_cast<int>(dtype)];
    for (const Part& part : parts) {
      if (part.partials) continue;
      double* mean = stats + cut.blocks * 2 * part.first + block * 2 * part.channels;
      const int64_t row = n * cut.rows + block * cut.block_rows;
      kernel(part.data + row * part.channels * element, cut.rows_of(block), part.channels, mean, mean + part.channels);
    }
  }

  void coefficients(int64_t n, const double* stats, double* scratch, float* out_table) const {
    double *mean = scratch, *m2 = mean + channels, *counts = m2 + channels;
    for (int64_t b = 0; b < cut.blocks; ++b) counts[b] = static_cast<double>(cut.rows_of(b));
    for (const Part& part : parts) {
      if (part.partials) {
        const int64_t pieces = part.partials.shape[1];
        merge_pieces(part.partials.as<const float>() + n * pieces * 2 * part.channels, part.counts.as<const float>(),
                     pieces, part.channels, mean + part.first, m2 + part.first);
      } else {
        merge_pieces(stats + cut.blocks * 2 * part.first, counts, cut.blocks, part.channels, mean + part.first,
                     m2 + part.first);
      }
    }
    coefficients_of(mean, m2, static_cast<double>(cut.rows), channels, groups, affine, n, eps, out_table);
    const auto arrange = kernels().arrange[static_cast<int>(dtype)];
    for (const Part& part : parts) arrange(out_table + part.first, part.channels, channels, silu);
  }

  void apply(int64_t n, int64_t block, const float* table) const {
    const auto kernel = kernels().apply[static_cast<int>(dtype)];
    const int64_t row = n * cut.rows + block * cut.block_rows;
    for (const Part& part : parts)
      kernel(part.data + row * part.channels * element, out + (row * channels + part.first) * element,
             cut.rows_of(block), part.channels, channels, table + part.first, channels, silu, stream);
  }
};

}  // namespace

void group_norm_silu(const TensorView& x, const TensorView& out, const TensorView& weight, const TensorView& bias,
                     const TensorView& scale, const TensorView& shift, const TensorView& skip,
                     const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                     const TensorView& skip_counts, int64_t groups, double eps, bool silu, int threads) {
  const AffineParams affine{weight, bias, scale, shift};
  check_group_norm_silu(x, out, affine, skip, partials, counts, skip_partials, skip_counts, groups);
  if (out.numel() == 0) return;
  const int64_t N = x.shape[0], C = out.shape[1], element = element_size(x.dtype);

  Work work{{{x.data, x.shape[1], 0, partials, counts}}, Cut(x.shape[2] * x.shape[3], C * element), affine, out.data, C,
            groups, element, x.dtype, eps, silu, out.data != x.data && out.numel() * element >= kStreamBytes};
  if (skip) work.parts.push_back({skip.data, skip.shape[1], x.shape[1], skip_partials, skip_counts});
  for (const Part& part : work.parts) work.measured = work.measured && part.partials;
  const int64_t blocks = work.cut.blocks, stats_size = work.stats_size(), scratch_size = work.scratch_size();
  if (N * blocks == 1) threads = 1;
  threads = std::max(threads, 1);

  // Enough samples: each worker takes whole ones and meets the second read in its own cache, without a barrier.
  // Blocks are written last to first: the last ones read are still in the cache where the whole sample does not fit.
  if (threads == 1 || N % threads == 0 || N >= 4 * threads) {
    Workspace& w = workspace(threads * (stats_size + scratch_size), threads * 3 * C);
    double* doubles = w.doubles.data();
    float* floats = w.floats.data();
    auto sample = [&](int64_t n, int worker) {
      double* stats = doubles + worker * (stats_size + scratch_size);
      float* table = floats + worker * 3 * C;
      for (int64_t b = 0; b < blocks && !work.measured; ++b) work.measure(n, b, stats);
      work.coefficients(n, stats, stats + stats_size, table);
      for (int64_t b = blocks - 1; b >= 0; --b) work.apply(n, b, table);
    };
    return parallel_for(N, threads, sample);
  }

  // Few samples: each is cut over all workers; the same worker applies what it has read for the statistics. They meet
  // once: the coefficients of a sample are made by each that applies them, which takes no longer than by one for all.
  Workspace& w = workspace(N * stats_size + threads * scratch_size, threads * 3 * C);
  double *stats = w.doubles.data(), *scratch = stats + N * stats_size;
  float* tables = w.floats.data();
  Barrier measured;
  auto share_of = [&](int worker, int workers) {
    const Share share(N * blocks, worker, workers);
    if (!work.measured) {
      for (int64_t t = share.begin; t < share.end; ++t)
        work.measure(t / blocks, t % blocks, stats + t / blocks * stats_size);
      measured.wait(workers);
    }
    float* table = tables + worker * 3 * C;
    int64_t ready = -1;  // the sample that the table is of
    for (int64_t t = share.end - 1; t >= share.begin; --t) {
      const int64_t n = t / blocks;
      if (n != ready) work.coefficients(n, stats + n * stats_size, scratch + worker * scratch_size, table);
      ready = n;
      work.apply(n, t % blocks, table);
    }
  };
  parallel_team(threads, share_of);
}

}  // namespace idm
