// out = softmax(q k^T * scale) v for each sample and head.
//
//   q          [N, L, heads, d], k, v [N, S, heads, d]: one of float32, bfloat16, float16; any strides, last dimension dense
//   out        [N, L, heads, d] contiguous, of q's type
//
// Keys and values of a head are packed once, then blocks of queries walk them with an online softmax. bf16 multiplies
// in bf16 where the machine has the dot product (as matrix cores do), all else and all sums are float32. How the work
// is cut depends on the shape alone, so the result is the same bits for every number of threads.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, double scale,
               int threads);

// One head of one sample, as the vector code sees it. Strides are in elements.
struct AttentionHead {
  const char *q, *k, *v;
  char* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
  int64_t keys, width;
  float sign, scale_log2;  // the score is sign * q.k; the weight 2^((score - highest) * scale_log2)
  uint32_t *packed_keys, *packed_values;
};

struct AttentionSizes {
  int64_t panel_keys;                           // keys that one call of `pack` handles
  int64_t key_words, value_words, block_words;  // of a packed head, and of the scratch of one block of queries
};

constexpr int64_t kQueryBlock = 48;  // a multiple of every tile height

struct AttentionKernels {
  AttentionSizes (*sizes[kFloatTypes])(int64_t keys, int64_t width);
  void (*pack[kFloatTypes])(const AttentionHead& head, int64_t panel);
  // Queries [first, first + rows), rows <= kQueryBlock.
  void (*attend[kFloatTypes])(const AttentionHead& head, int64_t first, int64_t rows, uint32_t* scratch);
};

namespace baseline {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512bf16 {
extern const AttentionKernels kAttentionKernels;
}

}  // namespace idm
