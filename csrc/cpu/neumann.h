#pragma once

#include <cstdint>

#include "math/half.h"
#include "math/neumann.h"
#include "math/tensor_list.h"

namespace nestopt::cpu {

// Updates chunks [first, last) of a list whose operands are v, p (both of V) and av (of A). sq_norms, when not null,
// has one entry per chunk of the whole list and receives the squared norm of each chunk of the new v.
template <class V, class A>
void neumann_chunks(const TensorList<3>& list, int64_t first, int64_t last, const NeumannScalars<math_t<V>>& scalars,
                    double* sq_norms);

// The same where v has been stepped already: only adds it to p. The operands are v and p.
template <class V>
void neumann_sum_chunks(const TensorList<2>& list, int64_t first, int64_t last, double* sq_norms);

}  // namespace nestopt::cpu
