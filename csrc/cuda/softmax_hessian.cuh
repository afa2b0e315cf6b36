#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/softmax_hessian.h"
#include "math/softmax_hessian.h"

namespace nestopt::cuda {

constexpr int kWarp = 32;

// The sums of a group of threads, added up in an order that never changes; every thread gets them. kGroup is a warp, or
// the whole block, all of which must call it.
template <int kGroup, class T>
__device__ __forceinline__ SoftmaxSums<T> join_group(SoftmaxSums<T> sums) {
  const int lane = threadIdx.x % kWarp;
  const auto join_warp = [&] {
    for (int step = 1; step < kWarp; step *= 2) {
      const SoftmaxSums<T> other{__shfl_xor_sync(~0u, sums.largest, step), __shfl_xor_sync(~0u, sums.head, step),
                                 __shfl_xor_sync(~0u, sums.others, step), __shfl_xor_sync(~0u, sums.weighted, step)};
      sums = lane & step ? join(other, sums) : join(sums, other);  // the same for both, also where they tie
    }
  };
  join_warp();
  if constexpr (kGroup > kWarp) {
    constexpr int kWarps = kGroup / kWarp;
    static_assert(kGroup % kWarp == 0 && kWarps <= kWarp);
    __shared__ T largest[kWarps], head[kWarps];
    __shared__ double others[kWarps], weighted[kWarps];
    const int warp = threadIdx.x / kWarp;
    if (lane == 0) {
      largest[warp] = sums.largest;
      head[warp] = sums.head;
      others[warp] = sums.others;
      weighted[warp] = sums.weighted;
    }
    __syncthreads();
    sums = lane < kWarps ? SoftmaxSums<T>{largest[lane], head[lane], others[lane], weighted[lane]}
                         : SoftmaxSums<T>::none();
    __syncthreads();  // the next row writes there
    join_warp();
  }
  return sums;
}

// A group of threads for each row. Neighbouring threads take neighbouring classes whatever the alignment of a row, of
// which an odd number of classes leaves little, and a few classes at once, so that enough loads are under way.
template <class V, class A, int kGroup, int kBlock>
__global__ void __launch_bounds__(kBlock) softmax_hessian_kernel(const SoftmaxHessianRows __grid_constant__ rows) {
  using T = math_t<V>;
  constexpr int kAtOnce = 16 / static_cast<int>(sizeof(T));
  constexpr int kStride = kAtOnce * kGroup;
  constexpr int kGroups = kBlock / kGroup;
  const int member = threadIdx.x % kGroup;
  for (int64_t r = int64_t{blockIdx.x} * kGroups + threadIdx.x / kGroup; r < rows.rows;
       r += int64_t{gridDim.x} * kGroups) {
    V* const u = rows.u_row<V>(r);
    const A* const z = rows.logits_row<A>(r);
    const double weight = rows.weight(r);
    if (weight == 0) {
      for (int64_t c = member; c < rows.classes; c += kGroup) u[c] = store<V>(T(0));
      continue;
    }
    SoftmaxSums<T> sums = SoftmaxSums<T>::none();
    const int64_t whole = rows.classes - rows.classes % kStride;
    for (int64_t at = member; at < whole; at += kStride) {
      T zs[kAtOnce], us[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) {
        zs[k] = load(z[at + k * kGroup]);
        us[k] = load(u[at + k * kGroup]);
      }
      for (int k = 0; k < kAtOnce; ++k) include(sums, zs[k], us[k]);
    }
    for (int64_t c = whole + member; c < rows.classes; c += kGroup) include(sums, T(load(z[c])), T(load(u[c])));

    const SoftmaxRow<T> row = finish(join_group<kGroup>(sums), weight);

    // From the end: what was read last is the likeliest to be in a cache still.
    for (int64_t c = whole + member; c < rows.classes; c += kGroup) {
      u[c] = store<V>(softmax_hessian(row, exp_nonpositive(T(load(z[c])) - row.largest), T(load(u[c]))));
    }
    for (int64_t at = whole - kStride + member; at >= 0; at -= kStride) {
      T zs[kAtOnce], us[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) {
        zs[k] = load(z[at + k * kGroup]);
        us[k] = load(u[at + k * kGroup]);
      }
      for (int k = 0; k < kAtOnce; ++k)
        u[at + k * kGroup] = store<V>(softmax_hessian(row, exp_nonpositive(zs[k] - row.largest), us[k]));
    }
  }
}

}  // namespace nestopt::cuda
