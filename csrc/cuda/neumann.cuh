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

// The squared norm of what a block sees of the new v. The sum of a chunk has its own place, whichever block comes to
// it.
template <bool kNorm>
class ChunkNorms {
 public:
  __device__ __forceinline__ explicit ChunkNorms(double* partials) : partials_(partials) {}
  __device__ __forceinline__ void include(double x) {
    if constexpr (kNorm) sum_ += x * x;
  }
  __device__ __forceinline__ void end_chunk(int64_t chunk) {
    if constexpr (kNorm) {
      const double sum = block_sum<kThreads>(sum_);
      if (threadIdx.x == 0) partials_[chunk] = sum;
      sum_ = 0;
    }
  }

 private:
  double* partials_;
  double sum_ = 0;
};

template <class V, class A, bool kNorm>
class NeumannOp {
 public:
  using M = math_t<V>;
  using Operands = cuda::Operands<V, V, const A>;
  using Arguments = NeumannArguments;

  __device__ __forceinline__ explicit NeumannOp(const Arguments& a)
      : scalars_{static_cast<M>(a.alpha.get()), static_cast<M>(a.damping)}, norms_(a.partials) {}

  __device__ __forceinline__ bool wanted() const { return true; }

  __device__ __forceinline__ void operator()(V& v, V& p, const A& av) {
    norms_.include(nestopt::neumann<V>(scalars_, static_cast<M>(load(av)), v, p));
  }

  __device__ __forceinline__ void end_chunk(int64_t chunk) { norms_.end_chunk(chunk); }

 private:
  NeumannScalars<M> scalars_;
  ChunkNorms<kNorm> norms_;
};

struct NeumannSumArguments {
  double* partials;  // as above
};

template <class V, bool kNorm>
class NeumannSumOp {
 public:
  using Operands = cuda::Operands<const V, V>;
  using Arguments = NeumannSumArguments;

  __device__ __forceinline__ explicit NeumannSumOp(const Arguments& a) : norms_(a.partials) {}

  __device__ __forceinline__ bool wanted() const { return true; }

  __device__ __forceinline__ void operator()(const V& v, V& p) { norms_.include(nestopt::neumann_sum(v, p)); }

  __device__ __forceinline__ void end_chunk(int64_t chunk) { norms_.end_chunk(chunk); }

 private:
  ChunkNorms<kNorm> norms_;
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
