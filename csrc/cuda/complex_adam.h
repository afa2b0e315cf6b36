#pragma once

#include <cuda_runtime_api.h>

#include "cuda/scalar.h"
#include "math/complex_adam.h"
#include "math/half.h"
#include "math/tensor_list.h"

namespace nestopt::cuda {

struct ComplexAdamArguments {
  ComplexAdamOptions options;  // whose lr and grad_scale are those below
  Scalar lr = {};
  Scalar grad_scale = {.value = 1};
  Scalar found_inf = {};        // nothing is written unless it is 0
  bool step_is_double = false;  // else the steps are floats
};

// Adds 1 to the elements of a list of steps (T: float or double), unless found_inf is not 0. To be launched before
// complex_adam(), where the blocks of a tensor must all read the same step.
template <class T>
cudaError_t count_steps(const TensorList<1>& steps, Scalar found_inf, cudaStream_t stream);

// Updates a list whose operands are param, grad (both of P), exp_avg, exp_avg_imag if kComplex, exp_avg_sq,
// max_exp_avg_sq if kAmsgrad (all of math_t<P>), and the step of the tensor. Neither allocates nor synchronizes.
// Returns the error of the first launch that failed, if any.
template <bool kComplex, bool kAmsgrad, class P>
cudaError_t complex_adam(const TensorList<complex_adam_operands(kComplex, kAmsgrad)>& list,
                         const ComplexAdamArguments& arguments, cudaStream_t stream);

}  // namespace nestopt::cuda
