// codes = argmin_k |z - codebook[k]|^2 at each position, quantised = those rows.
//
//   z, quantised   [N, D, H, W] in NHWC order, one of float32, bfloat16, float16
//   codebook       [K, D] contiguous, float32 or of z's type
//   codes          [N, H, W] int64 contiguous
//
// Distances are |c|^2 - 2 z.c in float32; the lowest index of equal ones; not a number is larger than all others. The
// codebook is packed once a call, then blocks of positions walk it, so distances never leave the cache; with codes of
// four channels or fewer they never leave the registers.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void vq_nearest(const TensorView& z, const TensorView& codebook, const TensorView& codes, const TensorView& quantised,
                int threads);

constexpr int64_t kPositionBlock = 48;  // a multiple of every tile height

struct Codebook {
  const char* rows;  // [size][width]
  int64_t size, width;
  uint32_t* packed;  // [panels][width][codes of a panel]
  float* squares;    // [panels][codes of a panel], infinite where there is no code
};

struct VqKernels {
  int64_t panel_codes;
  int64_t (*scratch_words)(int64_t width);
  void (*pack[kFloatTypes])(const Codebook& codebook, int64_t panel);  // by the codebook's type
  // Nearest codes of `rows` <= kPositionBlock positions. By z's type.
  void (*search[kFloatTypes])(const char* z, int64_t rows, const Codebook& codebook, int64_t* codes, uint32_t* scratch);
  // Row `code` of the codebook as z's type. By z's type and the codebook's.
  void (*copy[kFloatTypes][kFloatTypes])(const Codebook& codebook, int64_t code, char* out);
};

namespace baseline {
extern const VqKernels kVqKernels;
}
namespace avx2 {
extern const VqKernels kVqKernels;
}
namespace avx512 {
extern const VqKernels kVqKernels;
}
namespace avx512bf16 {
extern const VqKernels kVqKernels;
}

}  // namespace idm
