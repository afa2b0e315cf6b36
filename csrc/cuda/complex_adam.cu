#include "cuda/complex_adam.cuh"

namespace nestopt::cuda {

template <class T>
cudaError_t count_steps(const TensorList<1>& steps, Scalar found_inf, cudaStream_t stream) {
  return for_each_element<CountStepsOp<T>>(steps, {found_inf}, stream);
}

// Bytes per element: read param, grad and each average, write all but grad. In float32 that is 28 with a real and 36
// with a complex average, with 16-bit params 22 and 30; with amsgrad 8 more.
template <bool kComplex, bool kAmsgrad, class P>
cudaError_t complex_adam(const TensorList<complex_adam_operands(kComplex, kAmsgrad)>& list,
                         const ComplexAdamArguments& arguments, cudaStream_t stream) {
  return for_each_element<ComplexAdamOp<kComplex, kAmsgrad, P>>(list, arguments, stream);
}

template cudaError_t count_steps<float>(const TensorList<1>&, Scalar, cudaStream_t);
template cudaError_t count_steps<double>(const TensorList<1>&, Scalar, cudaStream_t);

#define NESTOPT_INSTANTIATE_ONE(kComplex, kAmsgrad, P)      \
  template cudaError_t complex_adam<kComplex, kAmsgrad, P>( \
      const TensorList<complex_adam_operands(kComplex, kAmsgrad)>&, const ComplexAdamArguments&, cudaStream_t);
#define NESTOPT_INSTANTIATE(P)             \
  NESTOPT_INSTANTIATE_ONE(false, false, P) \
  NESTOPT_INSTANTIATE_ONE(false, true, P)  \
  NESTOPT_INSTANTIATE_ONE(true, false, P)  \
  NESTOPT_INSTANTIATE_ONE(true, true, P)
NESTOPT_INSTANTIATE(float)
NESTOPT_INSTANTIATE(double)
NESTOPT_INSTANTIATE(BFloat16)
NESTOPT_INSTANTIATE(Float16)
#undef NESTOPT_INSTANTIATE
#undef NESTOPT_INSTANTIATE_ONE

}  // namespace nestopt::cuda
