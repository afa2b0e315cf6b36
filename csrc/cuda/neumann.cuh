#pragma once

#include <cuda_runtime.h>

#include "cuda/block_sum.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/neumann.h"
#include "math/neumann.h"

namespace nestopt::cuda {

struct NeumannArguments {
  Scalar alpha;
  double damping;
  double* partials;  // one for each chunk of the list, or null
};

template <class V, class A, bool kNorm>
class NeumannOp {
 public:
  using M = math_t<V>;
  using Operands = cuda::Operands<V, V, const A>;
  using Arguments = NeumannArguments;

  __device__ __forceinline__ explicit NeumannOp(const Arguments& a)
      : scalars_{static_cast<M>(a.alpha.get()), static_cast<M>(a.damping)}, partials_(a.partials) {}

  __device__ __forceinline__ bool wanted() const { return true; }

  __device__ __forceinline__ void operator()(V& v, V& p, const A& av) {
    const double now = nestopt::neumann<V>(scalars_, static_cast<M>(load(av)), v, p);
    if constexpr (kNorm) sum_ += now * now;
  }

  // The sum of a chunk has its own place, whichever block comes to it.
  __device__ __forceinline__ void end_chunk(int64_t chunk) {
    if constexpr (kNorm) {
      const double sum = block_sum<kThreads>(sum_);
      if (threadIdx.x == 0) partials_[chunk] = sum;
      sum_ = 0;
    }
  }

 private:
  NeumannScalars<M> scalars_;
  double* partials_;
  double sum_ = 0;
};

constexpr uint32_t kSumThreads = 1024;

// One block. T: float or double.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const double* partials, int64_t n, T* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += partials[i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) *total = static_cast<T>(sum);
}

}  // namespace nestopt::cuda
