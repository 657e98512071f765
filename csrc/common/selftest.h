// Small kernels that show that the wrappers of cuda.h and mma.cuh do what they say, on a device and in their CPU twins.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace idm {

// out [32, 6] int32: what each lane of a warp gets from __shfl_sync(lane * 3 % 32), xor 5, up 3, down 7 (each of the
// value 100 + lane), down 2 in segments of 8, and __ballot_sync(lane % 3 == 0).
void selftest_shuffles(const TensorView& out, uint64_t stream);

// out [rows] = sum of each row of x [rows, width] float32: warps by shuffles, then shared memory, in a fixed order.
void selftest_row_sums(const TensorView& x, const TensorView& out, uint64_t stream);

// out [M, N] float32 = a [M, K] b, b being [N, K], or [K, N] with `transposed`; float16 or bfloat16, dense. M a multiple
// of 16, N and K of 8: cp.async with zero fill, ldmatrix (x4 for a, x2 for b) and mma, two tiles of K under way.
void selftest_matmul(const TensorView& a, const TensorView& b, const TensorView& out, bool transposed, uint64_t stream);

}  // namespace idm
