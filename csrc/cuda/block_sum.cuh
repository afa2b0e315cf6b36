#pragma once

#include <cuda_runtime.h>

namespace nestopt::cuda {

// The sum of x over a block of kBlockThreads threads, added up in an order that never changes; thread 0 gets it. Every
// thread of the block must call it.
template <int kBlockThreads>
__device__ __forceinline__ double block_sum(double x) {
  constexpr int kWarp = 32;
  constexpr int kWarps = kBlockThreads / kWarp;
  static_assert(kBlockThreads % kWarp == 0 && kWarps <= kWarp);
  __shared__ double warps[kWarps];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = lane < kWarps ? warps[lane] : 0;
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
  }
  __syncthreads();  // the next call writes to warps
  return x;
}

// The sum over a group of threads, added up in an order that never changes; the first one gets it. kGroup is a warp, or
// the whole block, all of which must call it.
template <int kGroup>
__device__ __forceinline__ double group_sum(double x) {
  if constexpr (kGroup > 32) {
    return block_sum<kGroup>(x);
  } else {
    static_assert(kGroup == 32);
    for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
    return x;
  }
}

}  // namespace nestopt::cuda
