#include "cpu/neumann.h"

#include <algorithm>

#include "cpu/list_walker.h"
#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

template <class V, class A>
NESTOPT_SIMD void dense_run(int64_t n, const NeumannScalars<math_t<V>> s, V* __restrict v, V* __restrict p,
                            const A* __restrict av) {
  for (int64_t i = 0; i < n; ++i) neumann<V>(s, math_t<V>(load(av[i])), v[i], p[i]);
}

template <class V>
NESTOPT_SIMD void dense_sum(int64_t n, const V* __restrict v, V* __restrict p) {
  for (int64_t i = 0; i < n; ++i) neumann_sum(v[i], p[i]);
}

// Sums squares in double, in a fixed order that vectorizes. As many lanes as hide the latency of an addition.
template <class V>
NESTOPT_SIMD double sum_of_squares(int64_t n, const V* __restrict v) {
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double x = load(v[i + lane]);
      lanes[lane] += x * x;
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    const double x = load(v[i]);
    lanes[i - whole] += x * x;
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

constexpr int64_t kCached = 2048;  // elements between update and norm that stay in the first-level cache

}  // namespace

template <class V, class A>
void neumann_chunks(const TensorList<3>& list, int64_t first, int64_t last, const NeumannScalars<math_t<V>>& s,
                    double* sq_norms) {
  const int64_t sizes[3] = {sizeof(V), sizeof(V), sizeof(A)};
  if (sq_norms) std::fill(sq_norms + first, sq_norms + last, 0.0);
  for_each_run(list, sizes, first, last, [&](int64_t chunk, const Run<3>& run) {
    const bool dense = run.dense();
    const int64_t block = !dense ? kBlock : sq_norms ? kCached : run.length;
    for (int64_t at = 0, n = 0; at < run.length; at += n) {
      n = std::min(block, run.length - at);
      V* v = run.at<V>(0) + at * run.strides[0];
      V* p = run.at<V>(1) + at * run.strides[1];
      A* av = run.at<A>(2) + at * run.strides[2];
      if (dense) {
        dense_run<V, A>(n, s, v, p, av);
        if (sq_norms) sq_norms[chunk] += sum_of_squares(n, v);
      } else {
        Block<V> v_block(v, run.strides[0], n), p_block(p, run.strides[1], n);
        Block<A> av_block(av, run.strides[2], n);
        dense_run<V, A>(n, s, v_block.get(), p_block.get(), av_block.get());
        v_block.put();
        p_block.put();
        if (sq_norms) sq_norms[chunk] += sum_of_squares(n, v_block.get());
      }
    }
  });
}

// Bytes per element: read v and p, write p; 12 in float32.
template <class V>
void neumann_sum_chunks(const TensorList<2>& list, int64_t first, int64_t last, double* sq_norms) {
  const int64_t sizes[2] = {sizeof(V), sizeof(V)};
  if (sq_norms) std::fill(sq_norms + first, sq_norms + last, 0.0);
  for_each_run(list, sizes, first, last, [&](int64_t chunk, const Run<2>& run) {
    const int64_t block = !run.dense() ? kBlock : sq_norms ? kCached : run.length;
    for (int64_t at = 0, n = 0; at < run.length; at += n) {
      n = std::min(block, run.length - at);
      V* const v = run.at<V>(0) + at * run.strides[0];
      V* const p = run.at<V>(1) + at * run.strides[1];
      if (run.dense()) {
        dense_sum<V>(n, v, p);
        if (sq_norms) sq_norms[chunk] += sum_of_squares(n, v);
      } else {
        Block<V> v_block(v, run.strides[0], n), p_block(p, run.strides[1], n);
        dense_sum<V>(n, v_block.get(), p_block.get());
        p_block.put();
        if (sq_norms) sq_norms[chunk] += sum_of_squares(n, v_block.get());
      }
    }
  });
}

template void neumann_sum_chunks<float>(const TensorList<2>&, int64_t, int64_t, double*);
template void neumann_sum_chunks<double>(const TensorList<2>&, int64_t, int64_t, double*);
template void neumann_sum_chunks<BFloat16>(const TensorList<2>&, int64_t, int64_t, double*);
template void neumann_sum_chunks<Float16>(const TensorList<2>&, int64_t, int64_t, double*);

#define NESTOPT_INSTANTIATE(V, A) \
  template void neumann_chunks<V, A>(const TensorList<3>&, int64_t, int64_t, const NeumannScalars<math_t<V>>&, double*);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(float, BFloat16)
NESTOPT_INSTANTIATE(float, Float16)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(Float16, Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cpu
