#pragma once

#include <vector>

#include "math/half.h"
#include "math/rank_one_update.h"
#include "test_list.h"

template <class M>
std::vector<nestopt::RankOneScalars<M>> rank_one_cases() {
  return {{.a = M(0.7), .b = M(-1.3)}, {.a = M(0), .b = M(0.25)}};
}

// The update as a plain loop over a list.
template <class V, class G>
void plain_rank_one_update(TestList<V, G>& list, const nestopt::RankOneScalars<nestopt::math_t<V>>& scalars) {
  list.for_each([&](size_t, V& v, G& g) {
    nestopt::rank_one_update<V>(scalars, static_cast<nestopt::math_t<V>>(nestopt::load(g)), v);
  });
}
