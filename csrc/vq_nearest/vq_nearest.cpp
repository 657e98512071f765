#include "vq_nearest/vq_nearest.h"

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr const char* kOp = "vq_nearest";

const VqKernels& kernels() {
  static constexpr const VqKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kVqKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

// Working memory of the calling thread, kept between calls.
uint32_t* workspace(int64_t words) {
  thread_local std::vector<uint32_t> memory;
  if (static_cast<int64_t>(memory.size()) < words) memory.resize(words);
  return memory.data();
}

}  // namespace

void vq_nearest(const TensorView& z, const TensorView& codebook, const TensorView& codes, const TensorView& quantised,
                int threads) {
  require(is_float(z) && is_nhwc(z), kOp, "z must be a float tensor in NHWC order");
  require(same_shape(z, quantised) && quantised.dtype == z.dtype && is_nhwc(quantised), kOp, "quantised must be as z");
  require(codebook.ndim == 2 && is_contiguous(codebook) && codebook.shape[1] == z.shape[1] && codebook.shape[0] > 0 &&
              codebook.shape[0] <= INT32_MAX && (codebook.dtype == z.dtype || codebook.dtype == DType::kFloat32),
          kOp, "codebook must be [K, D], contiguous, float32 or of z's type");
  require(codes.ndim == 3 && codes.dtype == DType::kInt64 && is_contiguous(codes) && codes.shape[0] == z.shape[0] &&
              codes.shape[1] == z.shape[2] && codes.shape[2] == z.shape[3],
          kOp, "codes must be int64 [N, H, W], contiguous");
  if (z.numel() == 0) return;

  const VqKernels& kernel = kernels();
  const int type = static_cast<int>(z.dtype), book_type = static_cast<int>(codebook.dtype);
  const int64_t D = z.shape[1], count = codes.numel(), row_bytes = D * element_size(z.dtype);
  const int64_t panels = (codebook.shape[0] + kernel.panel_codes - 1) / kernel.panel_codes;
  const int64_t padded = panels * kernel.panel_codes, scratch_words = kernel.scratch_words(D);
  const int64_t blocks = (count + kPositionBlock - 1) / kPositionBlock;
  threads = std::max(threads, 1);

  uint32_t* memory = workspace(padded * (D + 1) + threads * scratch_words);
  uint32_t* scratch = memory + padded * (D + 1);
  const Codebook book{codebook.data, codebook.shape[0], D, memory, reinterpret_cast<float*>(memory + padded * D)};
  auto pack = [&](int64_t panel, int) { kernel.pack[book_type](book, panel); };
  auto search = [&](int64_t block, int worker) {
    const int64_t first = count * block / blocks, rows = count * (block + 1) / blocks - first;
    int64_t* found = codes.as<int64_t>() + first;
    kernel.search[type](z.data + first * row_bytes, rows, book, found, scratch + worker * scratch_words);
    for (int64_t r = 0; r < rows; ++r)
      kernel.copy[type][book_type](book, found[r], quantised.data + (first + r) * row_bytes);
  };
  parallel_for(panels, threads, pack);
  parallel_for(blocks, threads, search);
}

}  // namespace idm
