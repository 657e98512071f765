// TensorView: what the native code knows of a tensor. Python owns the memory; native code neither allocates nor keeps it.
#pragma once

#include <cstdint>

namespace idm {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt64 = 3, kInt8 = 4, kInt32 = 5, kFloat8 = 6 };
constexpr int kDTypes = 7;  // kFloat8 is e4m3
constexpr int kFloatTypes = 3;  // the first three index the kernel tables

constexpr int kMaxDims = 5;

// Used in files compiled for AVX-512 and for the baseline alike. A copy that is not inlined would be one symbol for all
// of them, and the linker could keep the AVX-512 one.
#define IDM_ALWAYS_INLINE __attribute__((always_inline)) inline

struct TensorView {
  char* data = nullptr;  // nullptr: the argument was None
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  IDM_ALWAYS_INLINE explicit operator bool() const { return data != nullptr; }
  template <class T>
  IDM_ALWAYS_INLINE T* as() const {
    return reinterpret_cast<T*>(data);
  }
  IDM_ALWAYS_INLINE int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

inline int64_t element_size(DType dtype) {
  constexpr int64_t kSizes[kDTypes] = {4, 2, 2, 8, 1, 4, 1};
  return kSizes[static_cast<int>(dtype)];
}

}  // namespace idm
