// attention on CUDA, sm_80 and later: float16 and bfloat16, d a multiple of 8 and at most 512, every row of q, k and v
// aligned to 16 bytes. Otherwise as attention.h. Raises std::invalid_argument before anything is launched.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// How many parts the keys are best cut into, so that a small image fills the current device: a function of the shape and
// the device's multiprocessors alone. d <= 512.
int64_t attention_cuda_splits(int64_t samples, int64_t length, int64_t heads, int64_t d, int64_t keys);

// workspace: [splits, N, L, heads, d + 2] float32 contiguous, null for one split. The same bits for the same splits.
void attention_cuda(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                    const TensorView& workspace, double scale, uint64_t stream);

}  // namespace idm
