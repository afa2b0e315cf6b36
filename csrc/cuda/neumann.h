#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/scalar.h"
#include "math/half.h"
#include "math/tensor_list.h"

namespace nestopt::cuda {

// How many doubles of device memory neumann() or neumann_sum() wants as partials for this list.
int64_t neumann_partials(const TensorList<3>& list);
int64_t neumann_partials(const TensorList<2>& list);

// Updates a list whose operands are v, p (both of V) and av (of A). partials, when not null, receives the squared norm
// of each chunk of the new v. Neither allocates nor synchronizes. Returns the error of the first launch that failed.
template <class V, class A>
cudaError_t neumann(const TensorList<3>& list, Scalar alpha, double damping, double* partials, cudaStream_t stream);

// The same where v has been stepped already: only adds it to p. The operands are v and p.
template <class V>
cudaError_t neumann_sum(const TensorList<2>& list, double* partials, cudaStream_t stream);

// Adds up n partials, of one list or of several, into a float or a double on the device. The order depends on n alone.
cudaError_t sum_partials(const double* partials, int64_t n, void* total, bool total_is_double, cudaStream_t stream);

}  // namespace nestopt::cuda
