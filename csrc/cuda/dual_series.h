#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/scalar.h"
#include "math/dual_series.h"

namespace nestopt::cuda {

struct DualSeriesPlan {
  uint32_t blocks;  // more than one: a cooperative launch
  int64_t scratch;  // doubles of device memory that dual_series() wants
};

// max_blocks: how many blocks of 1024 threads run at once, on a device that can launch them as a group; 1 where not.
DualSeriesPlan plan_dual_series(const DualSeries& series, uint32_t max_blocks);

// All terms in one launch; gram is of G, the vectors of V. Neither allocates nor synchronizes. Returns the error of the
// launch.
template <class G, class V>
cudaError_t dual_series(const DualSeries& series, Scalar alpha, double damping, const DualSeriesPlan& plan,
                        double* scratch, cudaStream_t stream);

}  // namespace nestopt::cuda
