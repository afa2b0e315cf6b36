#pragma once

#include <cstdint>

#include "math/complex_adam.h"
#include "math/half.h"
#include "math/tensor_list.h"

namespace nestopt::cpu {

// Updates chunks [first, last) of a list whose operands are param, grad (both of P), exp_avg, exp_avg_imag if kComplex,
// exp_avg_sq, max_exp_avg_sq if kAmsgrad (all of math_t<P>), and the ComplexAdamScalars<math_t<P>> of the tensor. Safe
// to call from several threads on disjoint ranges.
template <bool kComplex, bool kAmsgrad, class P>
void complex_adam_chunks(const TensorList<complex_adam_operands(kComplex, kAmsgrad)>& list, int64_t first,
                         int64_t last);

}  // namespace nestopt::cpu
