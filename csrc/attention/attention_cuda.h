// attention on CUDA, sm_80 and later: float16 and bfloat16, d a multiple of 8 and at most 512, every row of q, k and v
// aligned to 16 bytes. Otherwise as attention.h. Raises std::invalid_argument before anything is launched.
#pragma once

#include "common/tensor_view.h"

namespace idm {

void attention_cuda(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, double scale,
                    uint64_t stream);

}  // namespace idm
