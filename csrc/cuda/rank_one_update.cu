#include "cuda/rank_one_update.cuh"

namespace nestopt::cuda {

// Bytes per element: read v and g, write v; 12 in float32, 6 in 16 bits.
template <class V, class G>
cudaError_t rank_one_update(const TensorList<2>& list, Scalar a, Scalar b, cudaStream_t stream) {
  return for_each_element<RankOneOp<V, G>>(list, {a, b}, stream);
}

#define NESTOPT_INSTANTIATE(V, G) \
  template cudaError_t rank_one_update<V, G>(const TensorList<2>&, Scalar, Scalar, cudaStream_t);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(float, BFloat16)
NESTOPT_INSTANTIATE(float, Float16)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(Float16, Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cuda
