#pragma once

#include <cuda_runtime_api.h>

#include "math/half.h"
#include "math/softmax_hessian.h"

namespace nestopt::cuda {

// Updates all rows; u is of V, logits of A. Neither allocates nor synchronizes. Returns the error of the launch.
template <class V, class A>
cudaError_t softmax_hessian(const SoftmaxHessianRows& rows, cudaStream_t stream);

}  // namespace nestopt::cuda
