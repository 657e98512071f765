// The native module: a table of contents. Contracts are in the headers; Python's side of each is kernels/<op>/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "channel_stats/channel_stats.h"
#include "common/bind.h"
#include "common/cpu_isa.h"
#include "common/threads.h"
#include "group_norm_silu/group_norm_silu.h"
#include "norm_coefficients/norm_coefficients.h"
#include "sampler_update/sampler_update.h"

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of idm_fast. A tensor is (data_ptr, dtype code, shape, strides); None where it is optional.";

  m.def("group_norm_silu", &idm::group_norm_silu, NoGil());
  m.def("channel_stats", &idm::channel_stats, NoGil());
  m.def("norm_coefficients", &idm::norm_coefficients, NoGil());
  m.def("sampler_update", &idm::sampler_update, NoGil());
  m.def("philox_normal", &idm::philox_normal, NoGil());

  m.def("cpu_isa", &idm::cpu_isa_name, "Instruction set of the CPU kernels in use.");
  m.def("cpu_isas", &idm::cpu_isa_names, "Instruction sets that this machine runs, best first.");
  m.def("set_cpu_isa", &idm::set_cpu_isa, "Forces one of cpu_isas(); '' is the best. For tests and benchmarks.");
  m.def("threads_runtime", &idm::threads_runtime, "'openmp' (the team that torch uses) or 'std' (a pool of its own).");
}
