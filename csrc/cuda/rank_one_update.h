#pragma once

#include <cuda_runtime_api.h>

#include "cuda/scalar.h"
#include "math/half.h"
#include "math/tensor_list.h"

namespace nestopt::cuda {

// Updates a list whose operands are v (of V) and g (of G). Neither allocates nor synchronizes. Returns the error of the
// first launch that failed.
template <class V, class G>
cudaError_t rank_one_update(const TensorList<2>& list, Scalar a, Scalar b, cudaStream_t stream);

}  // namespace nestopt::cuda
