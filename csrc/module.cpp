// The native module: a table of contents. Contracts are in the headers; Python's side of each is kernels/<op>/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "channel_stats/channel_stats.h"
#include "attention/attention.h"
#include "common/bind.h"
#include "common/cpu_isa.h"
#include "common/huge_pages.h"
#include "common/program.h"
#include "common/step.h"
#include "common/threads.h"
#include "dynamic_threshold/dynamic_threshold.h"
#include "conv2d/conv2d.h"
#include "conv2d_int8/conv2d_int8.h"
#include "group_norm_silu/group_norm_silu.h"
#include "norm_coefficients/norm_coefficients.h"
#include "resample2x/resample2x.h"
#include "sampler_update/sampler_update.h"
#include "vq_nearest/vq_nearest.h"
#if defined(IDM_HAVE_CUDA)
#include "cuda_bindings.h"
#endif

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of idm_fast. A tensor is (data_ptr, dtype code, shape, strides); None where it is optional.";

  py::class_<idm::Layout>(m, "Layout", "dtype code, shape and strides of a tensor, checked and kept.")
      .def(py::init([](const idm::TensorView& view) {
        idm::Layout layout{view};
        layout.view.data = nullptr;
        return layout;
      }));

  idm::Ops ops(m);  // each as a function and as a call that a Program records
  ops.def("attention", &idm::attention);
  ops.def("group_norm_silu", &idm::group_norm_silu);
  ops.def("channel_stats", &idm::channel_stats);
  ops.def("norm_coefficients", &idm::norm_coefficients);
  ops.def("sampler_update", &idm::sampler_update);
  ops.def("philox_normal", &idm::philox_normal);
  ops.def("dynamic_threshold", &idm::dynamic_threshold);
  ops.def("vq_nearest", &idm::vq_nearest);
  ops.def("resample2x", &idm::resample2x);
  ops.def("table_row", &idm::table_row);
  ops.def("advance", &idm::advance);

  ops.def("conv2d", &idm::conv2d);
  m.def("conv2d_pack", &idm::conv2d_pack, NoGil());
  m.def("conv2d_packed_bytes", &idm::conv2d_packed_bytes);
  m.def("conv2d_block_rows", &idm::conv2d_block_rows);
  ops.def("conv2d_int8", &idm::conv2d_int8);
  m.def("conv2d_int8_pack", &idm::conv2d_int8_pack, NoGil());
  m.def("conv2d_int8_packed_bytes", &idm::conv2d_int8_packed_bytes);
  m.def("conv2d_int8_block_rows", &idm::conv2d_int8_block_rows);

#if defined(IDM_HAVE_CUDA)
  idm::bind_cuda(m);
  m.attr("cuda_architectures") = IDM_HAVE_CUDA;
#else
  m.attr("cuda_architectures") = "";
#endif

  m.def("huge_pages", &idm::huge_pages, "Asks for large pages under (address, bytes).");
  m.def("cpu_isa", &idm::cpu_isa_name, "Instruction set of the CPU kernels in use.");
  m.def("cpu_isas", &idm::cpu_isa_names, "Instruction sets that this machine runs, best first.");
  m.def("set_cpu_isa", &idm::set_cpu_isa, "Forces one of cpu_isas(); '' is the best. For tests and benchmarks.");
  m.def("threads_runtime", &idm::threads_runtime, "'openmp' (the team that torch uses) or 'std' (a pool of its own).");
}
