#pragma once

#include <cuda_runtime.h>

#include "cuda/multi_tensor.cuh"
#include "cuda/rank_one_update.h"
#include "math/rank_one_update.h"

namespace nestopt::cuda {

struct RankOneArguments {
  Scalar a;
  Scalar b;
};

template <class V, class G>
class RankOneOp {
 public:
  using M = math_t<V>;
  using Operands = cuda::Operands<V, const G>;
  using Arguments = RankOneArguments;

  __device__ __forceinline__ explicit RankOneOp(const Arguments& arguments)
      : scalars_{static_cast<M>(arguments.a.get()), static_cast<M>(arguments.b.get())} {}

  __device__ __forceinline__ bool wanted() const { return true; }

  __device__ __forceinline__ void operator()(V& v, const G& g) const {
    nestopt::rank_one_update<V>(scalars_, static_cast<M>(load(g)), v);
  }

  __device__ __forceinline__ void end_chunk(int64_t) const {}

 private:
  RankOneScalars<M> scalars_;
};

}  // namespace nestopt::cuda
