#include "resample2x/resample2x.h"

#include <cstring>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr int64_t kWorth = 64 * 1024;  // bytes of both tensors below which one worker alone is faster

const ResampleKernels& kernels() {
  static constexpr const ResampleKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kResampleKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

void check(const TensorView& x, bool up, const TensorView& out) {
  constexpr const char* kOp = "resample2x";
  require(x && is_float(x) && is_nhwc(x), kOp, "x must be a float tensor in NHWC order");
  require(out && out.dtype == x.dtype && is_nhwc(out), kOp, "out must be of x's type and in NHWC order");
  const TensorView &large = up ? out : x, &small = up ? x : out;
  require(large.shape[0] == small.shape[0] && large.shape[1] == small.shape[1] && large.shape[2] == 2 * small.shape[2] &&
              large.shape[3] == 2 * small.shape[3],
          kOp, "out must be [N, C, 2H, 2W], or [N, C, H / 2, W / 2] of an even x");
  require(apart(x, out), kOp, "x and out must not overlap");
}

}  // namespace

void resample2x(const TensorView& x, bool up, const TensorView& out, int threads) {
  check(x, up, out);
  if (x.numel() == 0) return;
  const int64_t C = x.shape[1], cell = C * element_size(x.dtype);
  const TensorView& small = up ? x : out;
  const int64_t rows = small.shape[0] * small.shape[2], width = small.shape[3], row = width * cell;
  const auto down_row = kernels().down_row[static_cast<int>(x.dtype)];
  auto task = [&](int64_t r, int) {
    if (!up) return down_row(x.data + 4 * r * row, x.data + (4 * r + 2) * row, out.data + r * row, width, C);
    const char* source = x.data + r * row;
    char* target = out.data + 4 * r * row;
    for (int64_t w = 0; w < width; ++w) {
      std::memcpy(target + 2 * w * cell, source + w * cell, static_cast<size_t>(cell));
      std::memcpy(target + (2 * w + 1) * cell, source + w * cell, static_cast<size_t>(cell));
    }
    std::memcpy(target + 2 * row, target, static_cast<size_t>(2 * row));
  };
  parallel_for(rows, 5 * rows * row <= kWorth ? 1 : threads, task);
}

}  // namespace idm
