#include "norm_coefficients/norm_coefficients.h"

#include "common/cuda.h"
#include "norm_coefficients/coefficients.cuh"
#include "norm_coefficients/contract.h"

namespace idm {
namespace {

struct CoefficientArgs {
  StatsPart x, skip;
  Affine affine;
  GroupTile tile;
  float* out;  // [N, 3, C]
  int64_t channels;
  float eps;
};

__global__ void __launch_bounds__(kNormThreads) coefficients_kernel(CoefficientArgs a) {
  IDM_DYNAMIC_SHARED(float, shared);
  const int64_t n = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * a.tile.channels;
  coefficients_of_parts(shared, a.tile, {a.x, a.skip, n, first}, a.channels, a.affine, a.eps);
  const int here = static_cast<int>(min(int64_t{a.tile.channels}, a.channels - first));
  for (int row = 0; row < 3; ++row)
    for (int i = threadIdx.x; i < here; i += kNormThreads)
      a.out[(n * 3 + row) * a.channels + first + i] = shared[row * a.tile.channels + i];
}

}  // namespace

void norm_coefficients_cuda(const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                            const TensorView& skip_counts, const TensorView& weight, const TensorView& bias,
                            const TensorView& scale, const TensorView& shift, int64_t groups, double eps,
                            const TensorView& out, uint64_t stream) {
  const AffineParams affine{weight, bias, scale, shift};
  check_norm_coefficients(partials, counts, skip_partials, skip_counts, affine, groups, out);
  const int64_t C = out.shape[2];
  CoefficientArgs a{};
  a.x = stats_part(partials, counts);
  a.skip = stats_part(skip_partials, skip_counts);
  a.affine = affine_of(affine);
  a.tile = group_tile(C, groups, 1, 32);  // few channels a block: the pieces of each are read by more threads at once
  a.out = out.as<float>();
  a.channels = C;
  a.eps = static_cast<float>(eps);
  const size_t bytes = a.tile.shared_floats() * sizeof(float);
  require(bytes <= max_shared_per_block() && a.tile.tiles(C) <= 65535, "norm_coefficients", "groups must be narrower");
  launch(coefficients_kernel, dim3(static_cast<unsigned>(out.shape[0]), static_cast<unsigned>(a.tile.tiles(C))),
         dim3(kNormThreads), bytes, stream, a);
}

}  // namespace idm
