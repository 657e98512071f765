#include "common/step.h"

#include <algorithm>
#include <cstring>

#include "common/checks.h"

namespace idm {
namespace {

void check_counter(const char* op, const TensorView& counter) {
  require(counter && counter.dtype == DType::kInt64 && counter.numel() == 1, op, "counter must be int64 [1]");
}

}  // namespace

int64_t counted_row(const char* op, int64_t step, const TensorView& counter, int64_t rows) {
  if (!counter) return step;
  check_counter(op, counter);
  return std::max<int64_t>(0, std::min(*counter.as<const int64_t>(), rows - 1));
}

void table_row(const TensorView& table, const TensorView& counter, const TensorView& out) {
  constexpr const char* kOp = "table_row";
  require(table && table.ndim == 2 && table.dtype == DType::kFloat32 && table.numel() > 0 && is_contiguous(table), kOp,
          "table must be contiguous float32 [T, S]");
  const int64_t S = table.shape[1];
  require(out && (out.ndim == 1 || out.ndim == 2) && out.shape[out.ndim - 1] == S && out.dtype == DType::kFloat32 &&
              is_contiguous(out),
          kOp, "out must be contiguous float32 [S] or [N, S]");
  require(apart(out, table) && apart(out, counter), kOp, "out must not overlap table and counter");
  check_counter(kOp, counter);
  const float* row = table.as<const float>() + counted_row(kOp, 0, counter, table.shape[0]) * S;
  for (int64_t at = 0; at < out.numel(); at += S) std::memcpy(out.as<float>() + at, row, static_cast<size_t>(S) * sizeof(float));
}

void advance(const TensorView& counter, int64_t by) {
  check_counter("advance", counter);
  *counter.as<int64_t>() += by;
}

}  // namespace idm
