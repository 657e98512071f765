#include "group_norm_silu/group_norm_silu.h"

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr const char* kOp = "group_norm_silu";
constexpr int64_t kBlockBytes = 16 * 1024;
constexpr int64_t kMaxBlocks = 16;

const GroupNormKernels& kernels() {
  static constexpr const GroupNormKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kGroupNormKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

// [C], or [N, C] with any distance between its rows (the halves of one projection are such slices).
void check_vector(const TensorView& t, const char* name, int ndim, int64_t N, int64_t C) {
  if (!t) return;
  const bool ok = t.ndim == ndim && is_float(t) && t.shape[ndim - 1] == C && (C == 1 || t.stride[ndim - 1] == 1) &&
                  (ndim == 1 || t.shape[0] == N);
  require(ok, kOp, std::string(name) + " must be a float tensor of the contract's shape with dense rows");
}

// How a sample is cut depends on its shape alone, never on the number of threads.
GroupNormShape cut(const TensorView& x, int64_t groups) {
  GroupNormShape s{};
  s.channels = x.shape[1];
  s.rows = x.shape[2] * x.shape[3];
  s.groups = groups;
  const int64_t bytes = s.channels * s.rows * element_size(x.dtype);
  const int64_t wanted = std::clamp<int64_t>(bytes / kBlockBytes, 1, std::min(kMaxBlocks, s.rows));
  s.block_rows = (s.rows + wanted - 1) / wanted;
  s.blocks = (s.rows + s.block_rows - 1) / s.block_rows;
  return s;
}

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

}  // namespace

void group_norm_silu(const TensorView& x, const TensorView& out, const TensorView& weight, const TensorView& bias,
                     const TensorView& scale, const TensorView& shift, int64_t groups, double eps, bool silu,
                     int threads) {
  require(x.ndim == 4 && is_float(x) && is_nhwc(x), kOp, "x must be a float tensor in NHWC order");
  require(same_shape(x, out) && out.dtype == x.dtype && is_nhwc(out), kOp, "out must be as x");
  const int64_t N = x.shape[0], C = x.shape[1];
  if (x.numel() == 0) return;
  require(groups > 0 && C % groups == 0, kOp, "num_groups must divide the channels");
  require(static_cast<bool>(scale) == static_cast<bool>(shift), kOp, "scale and shift must be given together");
  check_vector(weight, "weight", 1, N, C);
  check_vector(bias, "bias", 1, N, C);
  check_vector(scale, "scale", 2, N, C);
  check_vector(shift, "shift", 2, N, C);

  const GroupNormKernels& k = kernels();
  const int type = static_cast<int>(x.dtype);
  const GroupNormShape s = cut(x, groups);
  const AffineParams affine{weight, bias, scale, shift};
  const int64_t row_bytes = C * element_size(x.dtype), image_bytes = s.rows * row_bytes;
  const int64_t stats_size = s.blocks * 2 * C;
  threads = std::max(threads, 1);

  auto block_rows = [&](int64_t b) { return std::min(s.block_rows, s.rows - b * s.block_rows); };
  auto stats_block = [&](int64_t n, int64_t b, double* stats) {
    double* mine = stats + b * 2 * C;
    k.block_stats[type](x.data + n * image_bytes + b * s.block_rows * row_bytes, block_rows(b), C, {mine, mine + C});
  };
  auto apply_block = [&](int64_t n, int64_t b, const float* coefficients) {
    const int64_t offset = n * image_bytes + b * s.block_rows * row_bytes;
    k.apply[type](x.data + offset, out.data + offset, block_rows(b), C, coefficients, silu);
  };

  // Enough samples: each worker takes whole ones and meets the second read in its own cache, without a barrier.
  if (threads == 1 || N % threads == 0 || N >= 4 * threads) {
    const int64_t per_worker = stats_size + 2 * C;
    Workspace& w = workspace(threads * per_worker, threads * 3 * C);
    double* doubles = w.doubles.data();
    float* floats = w.floats.data();
    auto sample = [&](int64_t n, int worker) {
      double* stats = doubles + worker * per_worker;
      float* coefficients = floats + worker * 3 * C;
      for (int64_t b = 0; b < s.blocks; ++b) stats_block(n, b, stats);
      k.coefficients(s, stats, affine, n, eps, stats + stats_size, coefficients);
      for (int64_t b = 0; b < s.blocks; ++b) apply_block(n, b, coefficients);
    };
    return parallel_for(N, threads, sample);
  }

  // Few samples: every one is cut over all workers; the same worker applies what it has read for the statistics.
  Workspace& w = workspace(N * stats_size + 2 * C, N * 3 * C);
  double* stats = w.doubles.data();
  float* coefficients = w.floats.data();
  auto measure = [&](int64_t task, int) { stats_block(task / s.blocks, task % s.blocks, stats + task / s.blocks * stats_size); };
  parallel_for(N * s.blocks, threads, measure);
  for (int64_t n = 0; n < N; ++n)
    k.coefficients(s, stats + n * stats_size, affine, n, eps, stats + N * stats_size, coefficients + n * 3 * C);
  auto write = [&](int64_t task, int) { apply_block(task / s.blocks, task % s.blocks, coefficients + task / s.blocks * 3 * C); };
  parallel_for(N * s.blocks, threads, write);
}

}  // namespace idm
