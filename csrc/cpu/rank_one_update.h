#pragma once

#include <cstdint>

#include "math/half.h"
#include "math/rank_one_update.h"
#include "math/tensor_list.h"

namespace nestopt::cpu {

// Updates chunks [first, last) of a list whose operands are v (of V) and g (of G).
template <class V, class G>
void rank_one_update_chunks(const TensorList<2>& list, int64_t first, int64_t last,
                            const RankOneScalars<math_t<V>>& scalars);

}  // namespace nestopt::cpu
