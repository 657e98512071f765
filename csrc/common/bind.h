// pybind11 caster: a tuple (data_ptr, dtype code, shape, strides) or None becomes a TensorView. Of a tensor that comes
// again and again only the address need be told: (data_ptr, Layout).
#pragma once

#include <pybind11/pybind11.h>

#include "common/tensor_view.h"

namespace idm {

struct Layout {
  TensorView view;  // no data
};

}  // namespace idm

namespace pybind11::detail {

template <>
struct type_caster<idm::TensorView> {
  PYBIND11_TYPE_CASTER(idm::TensorView, const_name("TensorView | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    PyObject* tuple = source.ptr();
    if (!PyTuple_Check(tuple)) return false;
    if (PyTuple_GET_SIZE(tuple) == 2) return load_prepared(tuple);
    if (PyTuple_GET_SIZE(tuple) != 4) return false;
    const unsigned long long address = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, 0));
    const long dtype = PyLong_AsLong(PyTuple_GET_ITEM(tuple, 1));
    PyObject* shape = PyTuple_GET_ITEM(tuple, 2);
    PyObject* stride = PyTuple_GET_ITEM(tuple, 3);
    if (PyErr_Occurred() || dtype < 0 || dtype >= idm::kDTypes || !PyTuple_Check(shape) || !PyTuple_Check(stride)) return fail();
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    if (ndim > idm::kMaxDims || PyTuple_GET_SIZE(stride) != ndim) return fail();
    value.data = reinterpret_cast<char*>(address);
    value.dtype = static_cast<idm::DType>(dtype);
    value.ndim = static_cast<int>(ndim);
    for (Py_ssize_t i = 0; i < ndim; ++i) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride, i));
    }
    return PyErr_Occurred() ? fail() : true;
  }

 private:
  bool load_prepared(PyObject* tuple) {
    make_caster<idm::Layout> layout;
    const unsigned long long address = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, 0));
    if (PyErr_Occurred() || !layout.load(PyTuple_GET_ITEM(tuple, 1), false)) return fail();
    const idm::Layout* known = cast_op<idm::Layout*>(layout);
    if (known == nullptr) return false;
    value = known->view;
    value.data = reinterpret_cast<char*>(address);
    return true;
  }

  static bool fail() {
    PyErr_Clear();
    return false;
  }
};

}  // namespace pybind11::detail
