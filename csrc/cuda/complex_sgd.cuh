#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/complex_sgd.h"
#include "cuda/multi_tensor.cuh"
#include "math/complex_sgd.h"

namespace nestopt::cuda {

template <Momentum kMomentum, class P>
struct ComplexSgdOperands;
template <class P>
struct ComplexSgdOperands<Momentum::kNone, P> {
  using type = Operands<P, const P>;
};
template <class P>
struct ComplexSgdOperands<Momentum::kReal, P> {
  using type = Operands<P, const P, math_t<P>>;
};
template <class P>
struct ComplexSgdOperands<Momentum::kComplex, P> {
  using type = Operands<P, const P, math_t<P>, math_t<P>>;
};

template <Momentum kMomentum, class P>
class ComplexSgdOp {
 public:
  using M = math_t<P>;
  using Operands = typename ComplexSgdOperands<kMomentum, P>::type;
  using Arguments = ComplexSgdArguments;

  // One thread reads and divides for all: double precision is slow on many devices.
  __device__ __forceinline__ explicit ComplexSgdOp(const Arguments& a) {
    __shared__ ComplexSgdScalars<M> scalars;
    __shared__ bool wanted;
    if (threadIdx.x == 0) {
      wanted = a.found_inf.get() == 0;
      const M reciprocal = static_cast<M>(1.0 / a.grad_scale.get());
      scalars.lr = static_cast<M>(a.lr.get());
      scalars.momentum = static_cast<M>(a.momentum);
      scalars.momentum_imag = static_cast<M>(a.momentum_imag);
      scalars.gain = static_cast<M>(1 - a.dampening);
      scalars.weight_decay = static_cast<M>(a.weight_decay);
      scalars.grad_factor = a.maximize ? -reciprocal : reciprocal;
      scalars.nesterov = a.nesterov;
    }
    __syncthreads();
    scalars_ = scalars;
    wanted_ = wanted;
  }

  __device__ __forceinline__ bool wanted() const { return wanted_; }

  template <class... Buffers>
  __device__ __forceinline__ void operator()(P& param, const P& grad, Buffers&... buffers) const {
    M weight = load(param);
    M none[2] = {};
    if constexpr (kMomentum == Momentum::kNone)
      nestopt::complex_sgd<kMomentum>(scalars_, load(grad), weight, none[0], none[1]);
    if constexpr (kMomentum == Momentum::kReal)
      nestopt::complex_sgd<kMomentum>(scalars_, load(grad), weight, buffers..., none[1]);
    if constexpr (kMomentum == Momentum::kComplex)
      nestopt::complex_sgd<kMomentum>(scalars_, load(grad), weight, buffers...);
    param = store<P>(weight);
  }

  __device__ __forceinline__ void end_chunk(int64_t) const {}

 private:
  ComplexSgdScalars<M> scalars_;
  bool wanted_;
};

}  // namespace nestopt::cuda
