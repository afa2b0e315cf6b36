// One element of v <- a * v + b * g. The definition is rank_one_update_ in nestopt_ext/_reference.py.
#pragma once

#include "math/half.h"
#include "math/platform.h"

namespace nestopt {

template <class T>
struct RankOneScalars {
  T a;
  T b;
};

template <class V>
NESTOPT_HD void rank_one_update(const RankOneScalars<math_t<V>>& s, math_t<V> g, V& v) {
  v = store<V>(s.a * load(v) + s.b * g);
}

}  // namespace nestopt
