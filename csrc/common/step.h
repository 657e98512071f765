// The small calls of a sampling step that are no operations of their own: its counter, and its row of a table.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// out = row `counter` of table, the nearest row where there is none.
//   table [T, S] float32, counter int64 [1], out float32 [S], or [N, S] to get the row N times; both contiguous
void table_row(const TensorView& table, const TensorView& counter, const TensorView& out);

// counter += by; counter int64 [1].
void advance(const TensorView& counter, int64_t by);

// The row of `rows` that a counter (int64, one element) means: the nearest one. Null: `step`.
int64_t counted_row(const char* op, int64_t step, const TensorView& counter, int64_t rows);

}  // namespace idm
