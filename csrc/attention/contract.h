// The contract of attention as the native layer checks it, for the CPU and for CUDA.
#pragma once

#include "common/checks.h"

namespace idm {

constexpr const char* kAttention = "attention";

inline void check_attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out) {
  require(q && k && v && out && is_float(q), kAttention, "q, k, v and out must be float tensors");
  const auto rows = [&](const TensorView& t, const char* name) {
    require(t.ndim == 4 && t.dtype == q.dtype && t.shape[0] == q.shape[0] && t.shape[2] == q.shape[2] &&
                t.shape[3] == q.shape[3] && (t.shape[3] == 1 || t.stride[3] == 1),
            kAttention, std::string(name) + " must be [N, *, heads, d] of q's type, dense in its last dimension");
  };
  rows(q, "q");
  rows(k, "k");
  rows(v, "v");
  require(same_shape(k, v), kAttention, "v must be of k's shape");
  require(k.shape[1] > 0, kAttention, "k must hold at least one position");
  require(same_shape(q, out) && out.dtype == q.dtype && is_contiguous(out), kAttention,
          "out must be as q and contiguous");
}

}  // namespace idm
