#pragma once

#include <cstdint>

#include "math/half.h"
#include "math/softmax_hessian.h"

namespace nestopt::cpu {

// Updates rows [first, last); u is of V, logits of A.
template <class V, class A>
void softmax_hessian_rows(const SoftmaxHessianRows& rows, int64_t first, int64_t last);

}  // namespace nestopt::cpu
