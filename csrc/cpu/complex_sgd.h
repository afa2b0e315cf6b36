#pragma once

#include <cstdint>

#include "math/complex_sgd.h"
#include "math/half.h"
#include "math/tensor_list.h"

namespace nestopt::cpu {

// Updates chunks [first, last) of a list whose operands are param, grad (both of P), buffer and imaginary buffer (both
// of math_t<P>); lists with fewer buffers have fewer operands. Safe to call from several threads on disjoint ranges.
template <class P>
void complex_sgd_chunks(const TensorList<2>& list, int64_t first, int64_t last,
                        const ComplexSgdScalars<math_t<P>>& scalars);
template <class P>
void complex_sgd_chunks(const TensorList<3>& list, int64_t first, int64_t last,
                        const ComplexSgdScalars<math_t<P>>& scalars);
template <class P>
void complex_sgd_chunks(const TensorList<4>& list, int64_t first, int64_t last,
                        const ComplexSgdScalars<math_t<P>>& scalars);

}  // namespace nestopt::cpu
