// The CUDA kernels as Python sees them: in _C where it was built with CUDA, in the tests' _E where the CPU stands in.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/attention_cuda.h"
#include "channel_stats/channel_stats.h"
#include "common/bind.h"
#include "common/selftest.h"
#include "conv2d/conv2d_cuda.h"
#include "dynamic_threshold/dynamic_threshold.h"
#include "group_norm_silu/group_norm_silu.h"
#include "group_norm_silu/tiles.h"
#include "norm_coefficients/norm_coefficients.h"
#include "sampler_update/sampler_update.h"

namespace idm {

inline void bind_cuda(pybind11::module_& m) {
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("dynamic_threshold_cuda", &dynamic_threshold_cuda, NoGil());
  m.def("philox_normal_cuda", &philox_normal_cuda, NoGil());
  m.def("sampler_update_cuda", &sampler_update_cuda, NoGil());
  m.def("channel_stats_cuda", &channel_stats_cuda, NoGil());
  m.def("norm_coefficients_cuda", &norm_coefficients_cuda, NoGil());
  m.def("group_norm_silu_cuda", &group_norm_silu_cuda, NoGil());
  m.def("group_norm_silu_cuda_map", &group_norm_silu_cuda_map);
  m.def("attention_cuda", &attention_cuda, NoGil());
  m.def("attention_cuda_splits", &attention_cuda_splits);
  m.def("selftest_shuffles", &selftest_shuffles, NoGil());
  m.def("selftest_row_sums", &selftest_row_sums, NoGil());
  m.def("selftest_matmul", &selftest_matmul, NoGil());
  m.def("conv2d_cuda", &conv2d_cuda, NoGil());
  m.def("conv2d_cuda_plan", &conv2d_cuda_plan);
  m.def("conv2d_cuda_pieces", &conv2d_cuda_pieces);
  m.def("conv2d_cuda_map", &conv2d_cuda_map);
}

}  // namespace idm
