#pragma once

#include <cuda_runtime_api.h>

#include "math/hadamard_gram.h"

namespace nestopt::cuda {

// Inner products are of D, the Gram matrix is of G. Neither allocates nor synchronizes. Returns the error of the
// launch.
template <class D, class G>
cudaError_t add_hadamard_tile(const HadamardGramTile& tile, cudaStream_t stream);

}  // namespace nestopt::cuda
