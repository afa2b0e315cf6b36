#pragma once

#include <cstdint>

#include "math/half.h"
#include "math/row_dot.h"

namespace nestopt::cpu {

// Units [first, last); x and y are of X.
template <class X>
void row_dot_units(const RowDots& dots, int64_t first, int64_t last);

}  // namespace nestopt::cpu
