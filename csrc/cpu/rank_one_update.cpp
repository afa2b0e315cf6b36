#include "cpu/rank_one_update.h"

#include <algorithm>

#include "cpu/list_walker.h"
#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

template <class V, class G>
NESTOPT_SIMD void dense_run(int64_t n, const RankOneScalars<math_t<V>> s, V* __restrict v, const G* __restrict g) {
  for (int64_t i = 0; i < n; ++i) rank_one_update<V>(s, math_t<V>(load(g[i])), v[i]);
}

}  // namespace

// Bytes per element: read v and g, write v; 12 in float32.
template <class V, class G>
void rank_one_update_chunks(const TensorList<2>& list, int64_t first, int64_t last,
                            const RankOneScalars<math_t<V>>& s) {
  const int64_t sizes[2] = {sizeof(V), sizeof(G)};
  for_each_run(list, sizes, first, last, [&](int64_t, const Run<2>& run) {
    V* const v = run.at<V>(0);
    G* const g = run.at<G>(1);
    if (run.dense()) return dense_run<V, G>(run.length, s, v, g);
    for (int64_t at = 0; at < run.length; at += kBlock) {
      const int64_t n = std::min(kBlock, run.length - at);
      Block<V> v_block(v + at * run.strides[0], run.strides[0], n);
      Block<G> g_block(g + at * run.strides[1], run.strides[1], n);
      dense_run<V, G>(n, s, v_block.get(), g_block.get());
      v_block.put();
    }
  });
}

#define NESTOPT_INSTANTIATE(V, G) \
  template void rank_one_update_chunks<V, G>(const TensorList<2>&, int64_t, int64_t, const RankOneScalars<math_t<V>>&);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(float, BFloat16)
NESTOPT_INSTANTIATE(float, Float16)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(Float16, Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cpu
