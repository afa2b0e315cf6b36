#pragma once

#include <cuda_runtime_api.h>

#include "math/half.h"
#include "math/row_dot.h"

namespace nestopt::cuda {

// All rows; x and y are of X. Neither allocates nor synchronizes. Returns the error of the launch.
template <class X>
cudaError_t row_dot(const RowDots& dots, cudaStream_t stream);

}  // namespace nestopt::cuda
