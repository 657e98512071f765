// What the CPU and the CUDA side of sampler_update and philox_normal check alike.
#pragma once

#include <string>

#include "common/checks.h"

namespace idm {

inline void check_images(const char* op, const TensorView& x, const char* name) {
  require(x && x.ndim == 4 && x.dtype == DType::kFloat32 && is_nhwc(x), op,
          std::string(name) + " must be a float32 tensor in NHWC order");
}

inline void check_seeds(const char* op, const TensorView& seeds, int64_t N) {
  require(seeds && seeds.ndim == 1 && seeds.dtype == DType::kInt64 && seeds.shape[0] == N && is_contiguous(seeds), op,
          "seeds must be int64 [N]");
}

// Distance between neighbouring positions of a tensor whose channels are dense and whose positions are evenly spaced;
// 0 for any other. Dimensions of size 1 say nothing.
inline int64_t position_stride(const TensorView& t) {
  const int64_t C = t.shape[1], H = t.shape[2], W = t.shape[3];
  if (C > 1 && t.stride[1] != 1) return 0;
  const int64_t pitch = W > 1 ? t.stride[3] : H > 1 ? t.stride[2] : t.shape[0] > 1 ? t.stride[0] : C;
  const bool even = pitch >= C && (H == 1 || t.stride[2] == W * pitch) && (t.shape[0] == 1 || t.stride[0] == H * W * pitch);
  return even ? pitch : 0;
}

// What the checks find out: the position stride of network_input (0 without one), and whether model_output lies in the
// network's layout.
struct SamplerLayout {
  int64_t pitch;
  bool shuffled;
};

inline bool unshuffled_from(const TensorView& t, const TensorView& x, int64_t f) {
  return t.ndim == 4 && t.shape[0] == x.shape[0] && t.shape[1] == x.shape[1] * f * f && t.shape[2] == x.shape[2] / f &&
         t.shape[3] == x.shape[3] / f;
}

// x is not empty.
inline SamplerLayout check_sampler_update(const TensorView& x, const TensorView& model_output, const TensorView& history,
                                          const TensorView& table, int64_t step, const TensorView& seeds,
                                          const TensorView& network_input, const TensorView& threshold,
                                          const TensorView& base, int64_t unshuffle) {
  constexpr const char* kOp = "sampler_update";
  check_images(kOp, x, "x");
  check_images(kOp, history, "history");
  require(same_shape(x, history), kOp, "history must have the shape of x");
  const int64_t N = x.shape[0], f = unshuffle;
  require(f >= 1 && x.shape[2] % f == 0 && x.shape[3] % f == 0, kOp, "unshuffle must divide the height and the width");
  const bool plain = same_shape(x, model_output);
  require(model_output && (plain || unshuffled_from(model_output, x, f)) && is_float(model_output) && is_nhwc(model_output),
          kOp, "model_output must be a float tensor of x's shape, or of pixel_unshuffle(x)'s, in NHWC order");
  if (base) check_images(kOp, base, "base");
  require(!base || same_shape(x, base), kOp, "base must have the shape of x");
  require(table && table.ndim == 2 && table.shape[1] == 8 && table.dtype == DType::kFloat32 && is_contiguous(table), kOp,
          "table must be float32 [T, 8]");
  require(step >= 0 && step < table.shape[0], kOp, "step must be a row of table");
  check_seeds(kOp, seeds, N);
  require(!threshold || (threshold.ndim == 1 && threshold.dtype == DType::kFloat32 && threshold.shape[0] == N &&
                         is_contiguous(threshold)),
          kOp, "threshold must be float32 [N]");
  int64_t pitch = 0;
  if (network_input) {
    const TensorView& t = network_input;
    require(is_float(t) && unshuffled_from(t, x, f), kOp, "network_input must be a float tensor [N, C f^2, H / f, W / f]");
    pitch = position_stride(t);
    require(pitch > 0, kOp, "network_input must have dense channels and evenly spaced positions");
  }
  require(apart(x, history) && apart(x, network_input) && apart(history, network_input), kOp,
          "x, history and network_input must not overlap");
  for (const TensorView* written : {&x, &history, &network_input})
    for (const TensorView* read : {&model_output, &table, &seeds, &threshold, &base})
      require(apart(*written, *read), kOp, "what is written must not overlap with what is read");
  return {pitch, !plain};
}

inline void check_philox_normal(const TensorView& out, const TensorView& seeds, int64_t step) {
  constexpr const char* kOp = "philox_normal";
  check_images(kOp, out, "out");
  check_seeds(kOp, seeds, out.shape[0]);
  require(step >= -1 && step < 0xffffffffLL, kOp, "step must lie in [-1, 2^32 - 2]");
}

}  // namespace idm
