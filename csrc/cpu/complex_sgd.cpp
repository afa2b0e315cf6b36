#include "cpu/complex_sgd.h"

#include <algorithm>

#include "cpu/list_walker.h"
#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

template <Momentum kMomentum, class P, class M>
NESTOPT_SIMD void dense_run(int64_t n, const ComplexSgdScalars<M> s, P* __restrict param, const P* __restrict grad,
                            M* __restrict buf, M* __restrict imag) {
  for (int64_t i = 0; i < n; ++i) {
    M p = load(param[i]);
    M b = kMomentum == Momentum::kNone ? M(0) : buf[i];
    M c = kMomentum == Momentum::kComplex ? imag[i] : M(0);
    complex_sgd<kMomentum>(s, load(grad[i]), p, b, c);
    param[i] = store<P>(p);
    if (kMomentum != Momentum::kNone) buf[i] = b;
    if (kMomentum == Momentum::kComplex) imag[i] = c;
  }
}

template <Momentum kMomentum, class P, class M>
void strided_run(int64_t n, const ComplexSgdScalars<M>& s, const int64_t* strides, P* param, P* grad, M* buf, M* imag) {
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t length = std::min(kBlock, n - at);
    Block<P> p(param + at * strides[0], strides[0], length);
    Block<P> g(grad + at * strides[1], strides[1], length);
    if constexpr (kMomentum == Momentum::kNone) {
      dense_run<kMomentum, P, M>(length, s, p.get(), g.get(), nullptr, nullptr);
    } else {
      Block<M> b(buf + at * strides[2], strides[2], length);
      if constexpr (kMomentum == Momentum::kReal) {
        dense_run<kMomentum, P, M>(length, s, p.get(), g.get(), b.get(), nullptr);
      } else {
        Block<M> c(imag + at * strides[3], strides[3], length);
        dense_run<kMomentum, P, M>(length, s, p.get(), g.get(), b.get(), c.get());
        c.put();
      }
      b.put();
    }
    p.put();
  }
}

template <Momentum kMomentum, class P, int kOperands>
void walk(const TensorList<kOperands>& list, int64_t first, int64_t last, const ComplexSgdScalars<math_t<P>>& s) {
  using M = math_t<P>;
  int64_t sizes[kOperands];
  for (int k = 0; k < kOperands; ++k) sizes[k] = k < 2 ? sizeof(P) : sizeof(M);
  for_each_run(list, sizes, first, last, [&](int64_t, const Run<kOperands>& run) {
    P* param = run.template at<P>(0);
    P* grad = run.template at<P>(1);
    M* buf = kOperands > 2 ? run.template at<M>(2) : nullptr;
    M* imag = kOperands > 3 ? run.template at<M>(3) : nullptr;
    if (run.dense()) {
      dense_run<kMomentum, P, M>(run.length, s, param, grad, buf, imag);
    } else {
      strided_run<kMomentum, P, M>(run.length, s, run.strides, param, grad, buf, imag);
    }
  });
}

}  // namespace

template <class P>
void complex_sgd_chunks(const TensorList<2>& list, int64_t first, int64_t last, const ComplexSgdScalars<math_t<P>>& s) {
  walk<Momentum::kNone, P>(list, first, last, s);
}

template <class P>
void complex_sgd_chunks(const TensorList<3>& list, int64_t first, int64_t last, const ComplexSgdScalars<math_t<P>>& s) {
  walk<Momentum::kReal, P>(list, first, last, s);
}

template <class P>
void complex_sgd_chunks(const TensorList<4>& list, int64_t first, int64_t last, const ComplexSgdScalars<math_t<P>>& s) {
  walk<Momentum::kComplex, P>(list, first, last, s);
}

#define NESTOPT_INSTANTIATE(P)                                                                                      \
  template void complex_sgd_chunks<P>(const TensorList<2>&, int64_t, int64_t, const ComplexSgdScalars<math_t<P>>&); \
  template void complex_sgd_chunks<P>(const TensorList<3>&, int64_t, int64_t, const ComplexSgdScalars<math_t<P>>&); \
  template void complex_sgd_chunks<P>(const TensorList<4>&, int64_t, int64_t, const ComplexSgdScalars<math_t<P>>&);
NESTOPT_INSTANTIATE(float)
NESTOPT_INSTANTIATE(double)
NESTOPT_INSTANTIATE(BFloat16)
NESTOPT_INSTANTIATE(Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cpu
