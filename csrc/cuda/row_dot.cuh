#pragma once

#include <cuda_runtime.h>

#include "cuda/block_sum.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_dot.h"
#include "math/row_dot.h"

namespace nestopt::cuda {

// A group of threads for each unit. Neighbouring threads take neighbouring columns whatever the alignment of a row, and
// a few columns at once, so that enough loads are under way.
template <class X, int kGroup, int kBlock>
__global__ void __launch_bounds__(kBlock) row_dot_kernel(const RowDots __grid_constant__ dots) {
  using T = math_t<X>;
  constexpr int kAtOnce = 4;
  constexpr int kStride = kAtOnce * kGroup;
  constexpr int kGroups = kBlock / kGroup;
  const int member = threadIdx.x % kGroup;
  const int64_t units = dots.units();
  for (int64_t unit = int64_t{blockIdx.x} * kGroups + threadIdx.x / kGroup; unit < units;
       unit += int64_t{gridDim.x} * kGroups) {
    const X* const x = dots.x_of<X>(unit);
    const X* const y = dots.y_of<X>(unit);
    const int size = static_cast<int>(dots.size_of(unit));
    const int whole = size - size % kStride;
    double dot = 0;
    for (int at = member; at < whole; at += kStride) {
      T products[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) products[k] = T(load(x[at + k * kGroup])) * T(load(y[at + k * kGroup]));
      dot += (products[0] + products[1]) + (products[2] + products[3]);
    }
    for (int at = whole + member; at < size; at += kGroup) dot += T(load(x[at])) * T(load(y[at]));
    dot = group_sum<kGroup>(dot);
    if (member == 0) dots.keep(unit, dot);
  }
}

template <int kBlock>
__global__ void __launch_bounds__(kBlock) row_dot_partials_kernel(const RowDots __grid_constant__ dots) {
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < dots.rows; row += int64_t{gridDim.x} * kBlock) {
    dots.add_partials(row);
  }
}

}  // namespace nestopt::cuda
