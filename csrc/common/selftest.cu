#include "common/selftest.h"

#include "common/checks.h"
#include "common/cuda.h"
#include "common/mma.cuh"

namespace idm {
namespace {

__global__ void shuffles_kernel(int* out) {
  const int lane = threadIdx.x, value = 100 + lane;
  int* row = out + lane * 6;
  row[0] = __shfl_sync(kFullMask, value, lane * 3 % 32);
  row[1] = __shfl_xor_sync(kFullMask, value, 5);
  row[2] = __shfl_up_sync(kFullMask, value, 3);
  row[3] = __shfl_down_sync(kFullMask, value, 7);
  row[4] = __shfl_down_sync(kFullMask, value, 2, 8);
  row[5] = static_cast<int>(__ballot_sync(kFullMask, lane % 3 == 0));
}

constexpr int kSumThreads = 128;

__global__ void __launch_bounds__(kSumThreads) row_sums_kernel(const float* x, float* out, int64_t width) {
  __shared__ float warps[kSumThreads / kWarp];
  const float* row = x + blockIdx.x * width;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += kSumThreads) sum += row[i];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullMask, sum, lanes);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kSumThreads / kWarp; ++w) sum += warps[w];
    out[blockIdx.x] = sum;
  }
}

constexpr int kK = 16;  // one step of K; rows of tiles are 16 bytes longer so that ldmatrix meets all banks

// One warp a tile of 16 x 8. Shared: two stages of a [16][24], b [8][24] or [16][16].
template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(kWarp) matmul_kernel(const T* a, const T* b, float* out, int64_t N, int64_t K) {
  IDM_DYNAMIC_SHARED(T, shared);
  constexpr int kA = 16 * 24, kStage = kA + 16 * 16;
  const int lane = threadIdx.x;
  const int64_t m = blockIdx.x * int64_t{16}, n = blockIdx.y * int64_t{8};
  const int64_t steps = (K + kK - 1) / kK;

  const auto fetch = [&](int64_t step) {
    T* stage = shared + step % 2 * kStage;
    const int64_t k = step * kK + lane % 2 * 8;
    const bool in_k = k < K;
    cp_async16(stage + lane / 2 * 24 + lane % 2 * 8, in_k ? a + (m + lane / 2) * K + k : a, in_k);
    if (TRANSPOSED) {
      const bool in_row = step * kK + lane < K;
      if (lane < 16) cp_async16(stage + kA + lane * 16, in_row ? b + (step * kK + lane) * N + n : b, in_row);
    } else if (lane < 16) {
      cp_async16(stage + kA + lane / 2 * 24 + lane % 2 * 8, in_k ? b + (n + lane / 2) * K + k : b, in_k);
    }
    cp_async_commit();
  };

  float sums[4] = {};
  fetch(0);
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps)
      fetch(step + 1);
    else
      cp_async_commit();  // an empty group, so that there are always two
    cp_async_wait<1>();
    __syncthreads();
    const T* stage = shared + step % 2 * kStage;
    uint32_t af[4], bf[2];
    ldmatrix_x4(af, stage + lane % 16 * 24 + lane / 16 * 8);
    if (TRANSPOSED)
      ldmatrix_x2_trans(bf, stage + kA + lane % 16 * 16);
    else
      ldmatrix_x2(bf, stage + kA + lane % 8 * 24 + lane / 8 % 2 * 8);
    mma_m16n8k16<T>(sums, af, bf[0], bf[1]);
    __syncthreads();
  }
  float* target = out + (m + lane / 4) * N + n + lane % 4 * 2;
  target[0] = sums[0];
  target[1] = sums[1];
  target[8 * N] = sums[2];
  target[8 * N + 1] = sums[3];
}

}  // namespace

void selftest_shuffles(const TensorView& out, uint64_t stream) {
  require(out.dtype == DType::kInt32 && out.numel() == 192 && is_contiguous(out), "selftest", "out must be int32 [32, 6]");
  launch(shuffles_kernel, 1, kWarp, 0, stream, out.as<int>());
}

void selftest_row_sums(const TensorView& x, const TensorView& out, uint64_t stream) {
  require(x.ndim == 2 && x.dtype == DType::kFloat32 && is_contiguous(x), "selftest", "x must be dense float32 [rows, width]");
  require(out.numel() == x.shape[0] && out.dtype == x.dtype && is_contiguous(out), "selftest", "out must be float32 [rows]");
  launch(row_sums_kernel, static_cast<unsigned>(x.shape[0]), kSumThreads, 0, stream, x.as<float>(), out.as<float>(), x.shape[1]);
}

void selftest_matmul(const TensorView& a, const TensorView& b, const TensorView& out, bool transposed, uint64_t stream) {
  const int64_t M = a.shape[0], K = a.shape[1], N = b.shape[transposed ? 1 : 0];
  require(is_contiguous(a) && is_contiguous(b) && is_contiguous(out) && a.dtype == b.dtype && a.ndim == 2 && b.ndim == 2 &&
              out.ndim == 2 && out.dtype == DType::kFloat32 && out.shape[0] == M && out.shape[1] == N && M % 16 == 0 &&
              N % 8 == 0 && K % 8 == 0 && b.shape[transposed ? 0 : 1] == K,
          "selftest", "matrices must be dense, of the contract's shapes");
  visit_half(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(M / 16), static_cast<unsigned>(N / 8));
    const size_t shared = 2 * (16 * 24 + 16 * 16) * sizeof(T);
    launch(transposed ? matmul_kernel<T, true> : matmul_kernel<T, false>, grid, kWarp, shared, stream, a.as<T>(),
           b.as<T>(), out.as<float>(), N, K);
  });
}

}  // namespace idm
