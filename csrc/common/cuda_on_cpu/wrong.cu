// Kernels with the mistakes that the emulator is there to find. Never run on a device.
#include "common/cuda.h"
#include "common/cuda_on_cpu/wrong.h"
#include "common/mma.cuh"

namespace idm {
namespace {

__global__ void left_out_kernel() {
  if (threadIdx.x != 40) __syncthreads();
}

__global__ void apart_kernel() {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __syncthreads();
}

__global__ void mixed_kernel(int* out) {
  if (threadIdx.x < 16)
    *out = __shfl_xor_sync(kFullMask, 1, 1);
  else
    *out = __shfl_up_sync(kFullMask, 1, 1);
}

// Each thread reads its neighbour's value without a barrier.
__global__ void race_kernel(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

// Rounds of writing and reading with one barrier each: a warp that is ahead overwrites what another has yet to read.
__global__ void ahead_kernel(float* out) {
  __shared__ float values[64];
  float sum = 0.0f;
  for (int round = 1; round <= 4; ++round) {
    values[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    __syncwarp();
    sum += values[(threadIdx.x + 32) % 64];
    __syncwarp();
  }
  out[threadIdx.x] = sum;
}

__global__ void no_wait_kernel(const float* x, float* out) {
  IDM_DYNAMIC_SHARED(float, shared);
  cp_async16(shared + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void unwritten_kernel(float* out) {
  __shared__ float still[32];
  IDM_DYNAMIC_SHARED(float, dynamic);
  out[threadIdx.x] = still[threadIdx.x] + dynamic[threadIdx.x];
  still[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;  // for the next block
}

__global__ void beyond_kernel(float* out) {
  IDM_DYNAMIC_SHARED(float, dynamic);
  dynamic[threadIdx.x] = 1.0f;
  out[threadIdx.x] = dynamic[threadIdx.x + 1];
}

}  // namespace

void wrong(const std::string& mistake, const TensorView& x, const TensorView& out) {
  float* target = out.as<float>();
  if (mistake == "left out") launch(left_out_kernel, 1, 64, 0, 0);
  if (mistake == "apart") launch(apart_kernel, 1, 32, 0, 0);
  if (mistake == "mixed") launch(mixed_kernel, 1, 32, 0, 0, out.as<int>());
  if (mistake == "race") launch(race_kernel, 1, 64, 0, 0, target);
  if (mistake == "ahead") launch(ahead_kernel, 1, 64, 0, 0, target);
  if (mistake == "no wait") launch(no_wait_kernel, 1, 32, 512, 0, x.as<float>(), target);
  if (mistake == "unwritten") launch(unwritten_kernel, 2, 32, 128, 0, target);
  if (mistake == "beyond") launch(beyond_kernel, 1, 32, 128, 0, target);
  if (mistake == "block") launch(left_out_kernel, 1, 48, 0, 0);
  if (mistake == "grid") launch(left_out_kernel, dim3(1, 65536), 64, 0, 0);
  if (mistake == "shared") launch(left_out_kernel, 1, 64, 228 * 1024, 0);
}

}  // namespace idm
