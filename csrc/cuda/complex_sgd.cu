#include "cuda/complex_sgd.cuh"

namespace nestopt::cuda {

// Bytes per element: read param, grad and each buffer, write all but grad. In float32 that is 12 without momentum, 20
// with a real and 28 with a complex one; with 16-bit params 6, 14 and 22.
template <class P>
cudaError_t complex_sgd(const TensorList<2>& list, const ComplexSgdArguments& arguments, cudaStream_t stream) {
  return for_each_element<ComplexSgdOp<Momentum::kNone, P>>(list, arguments, stream);
}

template <class P>
cudaError_t complex_sgd(const TensorList<3>& list, const ComplexSgdArguments& arguments, cudaStream_t stream) {
  return for_each_element<ComplexSgdOp<Momentum::kReal, P>>(list, arguments, stream);
}

template <class P>
cudaError_t complex_sgd(const TensorList<4>& list, const ComplexSgdArguments& arguments, cudaStream_t stream) {
  return for_each_element<ComplexSgdOp<Momentum::kComplex, P>>(list, arguments, stream);
}

#define NESTOPT_INSTANTIATE(P)                                                                         \
  template cudaError_t complex_sgd<P>(const TensorList<2>&, const ComplexSgdArguments&, cudaStream_t); \
  template cudaError_t complex_sgd<P>(const TensorList<3>&, const ComplexSgdArguments&, cudaStream_t); \
  template cudaError_t complex_sgd<P>(const TensorList<4>&, const ComplexSgdArguments&, cudaStream_t);
NESTOPT_INSTANTIATE(float)
NESTOPT_INSTANTIATE(double)
NESTOPT_INSTANTIATE(BFloat16)
NESTOPT_INSTANTIATE(Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cuda
