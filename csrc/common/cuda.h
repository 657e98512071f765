// What every .cu file includes first: the CUDA runtime behind one thin layer.
//
// nvcc compiles it for a device. A C++ compiler with -DIDM_CUDA_ON_CPU gets a twin of all names used here instead
// (cuda_on_cpu/), so that the same kernels run, slowly, in the tests of a machine without a GPU. For that to work:
//   - kernels are started by idm::launch, never by <<<>>>;
//   - dynamic shared memory is named by IDM_DYNAMIC_SHARED; static __shared__ variables have no initialiser;
//   - assembler stands in mma.cuh alone, each wrapper with its twin;
//   - blocks are multiples of 32 threads, all of which reach every barrier and every warp collective (mask kFullMask).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/host_device.h"
#include "common/tensor_view.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define IDM_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(128) unsigned char idm_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(idm_dynamic_shared)

#elif defined(IDM_CUDA_ON_CPU)
#include "common/cuda_on_cpu/launch.h"
#include "common/cuda_on_cpu/types.h"
#include "common/cuda_on_cpu/warp.h"
#else
#error "compile .cu files with nvcc, or with -DIDM_CUDA_ON_CPU"
#endif

namespace idm {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;
constexpr size_t kDefaultShared = 48 * 1024;  // more dynamic shared memory must be asked for, function by function

// ---- dtypes: float, __half and __nv_bfloat16 are stored, float is computed ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);  // rounds to nearest even
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two 16-bit values as one register, the first in the low half: what mma fragments and wide loads are made of.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t bits) {
  T pair[2];
  memcpy(pair, &bits, sizeof bits);
  return make_float2(to_float(pair[0]), to_float(pair[1]));
}

template <class T>
struct Tag {
  using type = T;
};

// f(Tag<T>{}) for the storage type of a float dtype; the caller has checked that it is one.
template <class F>
void visit_float(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f(Tag<float>{});
  if (dtype == DType::kFloat16) return f(Tag<__half>{});
  if (dtype == DType::kBFloat16) return f(Tag<__nv_bfloat16>{});
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16");
}

// The same for the two that tensor cores take.
template <class F>
void visit_half(DType dtype, F&& f) {
  if (dtype == DType::kFloat16) return f(Tag<__half>{});
  if (dtype == DType::kBFloat16) return f(Tag<__nv_bfloat16>{});
  throw std::invalid_argument("dtype must be bfloat16 or float16");
}

// ---- the runtime ----

#if defined(__CUDACC__)

inline void cuda_check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline size_t max_shared_per_block() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// kernel(args...) on `stream` (a cudaStream_t as a number) of the current device; does not wait. Grids without a block
// do nothing. Errors of the launch itself raise std::runtime_error with the name of the kernel.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, uint64_t stream, A&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto describe = [&] {
    const char* name = nullptr;
    if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) != cudaSuccess) name = "a kernel";
    return std::string("launch of ") + name;
  };
  if (dynamic_shared > kDefaultShared) {
    const auto error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
    if (error != cudaSuccess) cuda_check(error, describe());
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  const auto error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  if (error != cudaSuccess) cuda_check(error, describe());
}

#else

inline int multiprocessors() { return emulated_multiprocessors(); }
inline size_t max_shared_per_block() { return kMaxEmulatedShared; }

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, uint64_t, A&&... args) {
  const std::tuple<P...> parameters(static_cast<P>(args)...);
  const auto thread = [&] { std::apply(kernel, parameters); };
  run_grid(grid, block, dynamic_shared, [](const void* f) { (*static_cast<decltype(&thread)>(f))(); }, &thread);
}

#endif

}  // namespace idm
