#pragma once

#include <cuda_runtime_api.h>

#include "cuda/scalar.h"
#include "math/half.h"
#include "math/tensor_list.h"

namespace nestopt::cuda {

struct ComplexSgdArguments {
  Scalar lr;
  double momentum = 0;
  double momentum_imag = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;
  bool maximize = false;
  Scalar grad_scale = {.value = 1};
  Scalar found_inf = {};  // nothing is written unless it is 0
};

// Updates a list whose operands are param, grad (both of P), buffer and imaginary buffer (both of math_t<P>); lists
// with fewer buffers have fewer operands. Neither allocates nor synchronizes. Returns the error of the first launch
// that failed, if any.
template <class P>
cudaError_t complex_sgd(const TensorList<2>& list, const ComplexSgdArguments& arguments, cudaStream_t stream);
template <class P>
cudaError_t complex_sgd(const TensorList<3>& list, const ComplexSgdArguments& arguments, cudaStream_t stream);
template <class P>
cudaError_t complex_sgd(const TensorList<4>& list, const ComplexSgdArguments& arguments, cudaStream_t stream);

}  // namespace nestopt::cuda
