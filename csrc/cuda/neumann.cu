#include "cuda/neumann.cuh"

namespace nestopt::cuda {

int64_t neumann_partials(const TensorList<3>& list) { return num_device_chunks(list); }
int64_t neumann_partials(const TensorList<2>& list) { return num_device_chunks(list); }

// Bytes per element: read v, p and av, write v and p; 20 in float32, 10 in 16 bits. The norm adds 8 bytes a chunk.
template <class V, class A>
cudaError_t neumann(const TensorList<3>& list, Scalar alpha, double damping, double* partials, cudaStream_t stream) {
  const NeumannArguments arguments{alpha, damping, partials};
  if (partials == nullptr) return for_each_element<NeumannOp<V, A, false>>(list, arguments, stream);
  return for_each_element<NeumannOp<V, A, true>>(list, arguments, stream);
}

// Bytes per element: read v and p, write p; 12 in float32, 6 in 16 bits. The norm adds 8 bytes a chunk.
template <class V>
cudaError_t neumann_sum(const TensorList<2>& list, double* partials, cudaStream_t stream) {
  if (partials == nullptr) return for_each_element<NeumannSumOp<V, false>>(list, {partials}, stream);
  return for_each_element<NeumannSumOp<V, true>>(list, {partials}, stream);
}

// One block: there is one number here for 4096 elements of each operand above.
cudaError_t sum_partials(const double* partials, int64_t n, void* total, bool total_is_double, cudaStream_t stream) {
  if (total_is_double)
    return launch(sum_kernel<double>, 1, kSumThreads, stream, partials, n, static_cast<double*>(total));
  return launch(sum_kernel<float>, 1, kSumThreads, stream, partials, n, static_cast<float*>(total));
}

template cudaError_t neumann_sum<float>(const TensorList<2>&, double*, cudaStream_t);
template cudaError_t neumann_sum<double>(const TensorList<2>&, double*, cudaStream_t);
template cudaError_t neumann_sum<BFloat16>(const TensorList<2>&, double*, cudaStream_t);
template cudaError_t neumann_sum<Float16>(const TensorList<2>&, double*, cudaStream_t);

#define NESTOPT_INSTANTIATE(V, A) \
  template cudaError_t neumann<V, A>(const TensorList<3>&, Scalar, double, double*, cudaStream_t);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(float, BFloat16)
NESTOPT_INSTANTIATE(float, Float16)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(Float16, Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cuda
