#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/complex_adam.h"
#include "cuda/multi_tensor.cuh"
#include "math/complex_adam.h"

namespace nestopt::cuda {

struct CountStepsArguments {
  Scalar found_inf;
};

template <class T>
class CountStepsOp {
 public:
  using Operands = cuda::Operands<T>;
  using Arguments = CountStepsArguments;

  __device__ __forceinline__ explicit CountStepsOp(const Arguments& a) : wanted_(a.found_inf.get() == 0) {}
  __device__ __forceinline__ bool wanted() const { return wanted_; }
  __device__ __forceinline__ void operator()(T& step) const { step += 1; }
  __device__ __forceinline__ void end_chunk(int64_t) const {}

 private:
  bool wanted_;
};

template <bool kComplex, bool kAmsgrad, class P>
struct ComplexAdamOperands {
  using type = Operands<P, const P, math_t<P>, math_t<P>, math_t<P>, math_t<P>>;
};
template <bool kComplex, class P>
struct ComplexAdamOperands<kComplex, !kComplex, P> {
  using type = Operands<P, const P, math_t<P>, math_t<P>, math_t<P>>;
};
template <class P>
struct ComplexAdamOperands<false, false, P> {
  using type = Operands<P, const P, math_t<P>, math_t<P>>;
};

template <bool kComplex, bool kAmsgrad, class P>
class ComplexAdamOp {
 public:
  using M = math_t<P>;
  using Operands = typename ComplexAdamOperands<kComplex, kAmsgrad, P>::type;
  using Arguments = ComplexAdamArguments;
  static constexpr uint32_t kMinBlocks = 2;  // have as much under way as four of fewer operands

  __device__ __forceinline__ explicit ComplexAdamOp(const Arguments& a)
      : arguments_(a), wanted_(a.found_inf.get() == 0) {}

  __device__ __forceinline__ bool wanted() const { return wanted_; }

  // One thread reads, divides and takes powers for all: double precision is slow on many devices.
  __device__ __forceinline__ void begin_chunk(const void* step) {
    __shared__ ComplexAdamScalars<M> scalars;
    __syncthreads();  // all have read those of the chunk before
    if (threadIdx.x == 0) {
      ComplexAdamOptions options = arguments_.options;
      options.lr = arguments_.lr.get();
      options.grad_scale = arguments_.grad_scale.get();
      scalars = complex_adam_scalars<M>(options, Scalar{step, arguments_.step_is_double}.get());
    }
    __syncthreads();
    scalars_ = scalars;
  }

  template <class... Averages>
  __device__ __forceinline__ void operator()(P& param, const P& grad, M& avg, Averages&... averages) const {
    M weight = load(param);
    M none = 0;
    const auto update = [&](M& imag, M& sq, M& max) {
      complex_adam<kComplex, kAmsgrad>(scalars_, load(grad), weight, avg, imag, sq, max);
    };
    if constexpr (kComplex && kAmsgrad) update(averages...);
    if constexpr (kComplex && !kAmsgrad) update(averages..., none);
    if constexpr (!kComplex && kAmsgrad) update(none, averages...);
    if constexpr (!kComplex && !kAmsgrad) update(none, averages..., none);
    param = store<P>(weight);
  }

  __device__ __forceinline__ void end_chunk(int64_t) const {}

 private:
  const Arguments& arguments_;
  bool wanted_;
  ComplexAdamScalars<M> scalars_;
};

}  // namespace nestopt::cuda
