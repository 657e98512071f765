#pragma once

#include <string>

#include "common/tensor_view.h"

namespace idm {

// Runs a kernel with the named mistake; out is float32 [64].
void wrong(const std::string& mistake, const TensorView& x, const TensorView& out);

}  // namespace idm
