#include "cpu/complex_adam.h"

#include <algorithm>

#include "cpu/list_walker.h"
#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

// Places of the operands; those that are not there share one with their neighbour.
template <bool kComplex, bool kAmsgrad>
struct Places {
  static constexpr int kAvg = 2;
  static constexpr int kImag = kAvg + kComplex;
  static constexpr int kSq = kImag + 1;
  static constexpr int kMax = kSq + kAmsgrad;
  static constexpr int kScalars = kMax + 1;
  static_assert(kScalars + 1 == complex_adam_operands(kComplex, kAmsgrad));
};

// imag and max may be null where they are not there.
template <bool kComplex, bool kAmsgrad, class P, class M>
NESTOPT_SIMD void dense_run(int64_t n, const ComplexAdamScalars<M> s, P* __restrict param, const P* __restrict grad,
                            M* __restrict avg, M* __restrict imag, M* __restrict sq, M* __restrict max) {
  for (int64_t i = 0; i < n; ++i) {
    M p = load(param[i]);
    M m = avg[i];
    M c = kComplex ? imag[i] : M(0);
    M v = sq[i];
    M w = kAmsgrad ? max[i] : M(0);
    complex_adam<kComplex, kAmsgrad>(s, load(grad[i]), p, m, c, v, w);
    param[i] = store<P>(p);
    avg[i] = m;
    if (kComplex) imag[i] = c;
    sq[i] = v;
    if (kAmsgrad) max[i] = w;
  }
}

template <bool kComplex, bool kAmsgrad, class P, class M, int kOperands>
void strided_run(const Run<kOperands>& run, const ComplexAdamScalars<M>& s) {
  using At = Places<kComplex, kAmsgrad>;
  for (int64_t at = 0; at < run.length; at += kBlock) {
    const int64_t n = std::min(kBlock, run.length - at);
    const auto block = [&]<class T>(int k) {
      return Block<T>(run.template at<T>(k) + at * run.strides[k], run.strides[k], n);
    };
    Block<P> param = block.template operator()<P>(0);
    Block<P> grad = block.template operator()<P>(1);
    Block<M> avg = block.template operator()<M>(At::kAvg);
    Block<M> imag = block.template operator()<M>(At::kImag);
    Block<M> sq = block.template operator()<M>(At::kSq);
    Block<M> max = block.template operator()<M>(At::kMax);
    dense_run<kComplex, kAmsgrad, P, M>(n, s, param.get(), grad.get(), avg.get(), kComplex ? imag.get() : nullptr,
                                        sq.get(), kAmsgrad ? max.get() : nullptr);
    param.put();
    avg.put();
    if constexpr (kComplex) imag.put();
    sq.put();
    if constexpr (kAmsgrad) max.put();
  }
}

}  // namespace

template <bool kComplex, bool kAmsgrad, class P>
void complex_adam_chunks(const TensorList<complex_adam_operands(kComplex, kAmsgrad)>& list, int64_t first,
                         int64_t last) {
  using M = math_t<P>;
  using At = Places<kComplex, kAmsgrad>;
  constexpr int kOperands = complex_adam_operands(kComplex, kAmsgrad);
  int64_t sizes[kOperands];
  for (int k = 0; k < kOperands; ++k) sizes[k] = k < At::kAvg ? sizeof(P) : k < At::kScalars ? sizeof(M) : 0;
  for_each_run(list, sizes, first, last, [&](int64_t, const Run<kOperands>& run) {
    const auto& s = *run.template at<const ComplexAdamScalars<M>>(At::kScalars);
    if (run.dense()) {
      dense_run<kComplex, kAmsgrad, P, M>(
          run.length, s, run.template at<P>(0), run.template at<P>(1), run.template at<M>(At::kAvg),
          kComplex ? run.template at<M>(At::kImag) : nullptr, run.template at<M>(At::kSq),
          kAmsgrad ? run.template at<M>(At::kMax) : nullptr);
    } else {
      strided_run<kComplex, kAmsgrad, P, M>(run, s);
    }
  });
}

#define NESTOPT_INSTANTIATE_ONE(kComplex, kAmsgrad, P)      \
  template void complex_adam_chunks<kComplex, kAmsgrad, P>( \
      const TensorList<complex_adam_operands(kComplex, kAmsgrad)>&, int64_t, int64_t);
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

}  // namespace nestopt::cpu
