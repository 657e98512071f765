// _E: every CUDA kernel of this folder tree, run on the CPU. Built by the tests, never installed.
#include <pybind11/pybind11.h>

#include "common/cuda_on_cpu/launch.h"
#include "common/cuda_on_cpu/wrong.h"
#include "cuda_bindings.h"

PYBIND11_MODULE(_E, m) {
  m.doc() = "The CUDA kernels of idm_fast on the CPU, for tests.";
  m.attr("cuda_architectures") = "cpu";
  idm::bind_cuda(m);
  m.def("set_multiprocessors", &idm::set_emulated_multiprocessors, "What idm::multiprocessors() says; 4 at first.");
  m.def("set_reversed", &idm::set_reversed, "Blocks and threads in the opposite order, where they are free to.");
  m.def("set_last_only", &idm::set_last_only, "The last block of a grid alone: its offsets are the largest.");
  m.def("wrong", &idm::wrong, "Runs a kernel with the named mistake.");
}
