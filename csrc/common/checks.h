// Contract checks of the native layer. Python has checked already with better words; these keep a wrong call from
// writing outside a buffer. They raise ValueError (std::invalid_argument) before any kernel runs.
#pragma once

#include <stdexcept>
#include <string>

#include "common/tensor_view.h"

namespace idm {

inline void require(bool ok, const char* op, const std::string& message) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + message);
}

// Strides of dimensions of size 1 say nothing and are not compared.
inline bool is_nhwc(const TensorView& t) {
  if (t.ndim != 4) return false;
  const int64_t expected[4] = {t.shape[1] * t.shape[2] * t.shape[3], 1, t.shape[1] * t.shape[3], t.shape[1]};
  for (int i = 0; i < 4; ++i)
    if (t.shape[i] != 1 && t.stride[i] != expected[i]) return false;
  return true;
}

inline bool is_contiguous(const TensorView& t) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.stride[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

// Whether the bytes that two tensors reach over (gaps between their elements included) have none in common.
inline bool apart(const TensorView& a, const TensorView& b) {
  auto end = [](const TensorView& t) {
    int64_t last = 0;
    for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i];
    return t.data + (last + 1) * element_size(t.dtype);
  };
  return !a || !b || a.data >= end(b) || b.data >= end(a);
}

inline bool is_float(const TensorView& t) { return static_cast<int>(t.dtype) < kFloatTypes; }

}  // namespace idm
