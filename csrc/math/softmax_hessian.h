// The Hessian of a weighted cross-entropy in the logits z of one row, times u: w (diag(p) - p p') u, p = softmax(z).
// The definition is softmax_hessian in nestopt_ext/_reference.py.
//
// A row is read twice. The first time it is summed up online: exponentials are relative to the largest logit so far,
// and the sums are scaled when a larger one comes. The second time each class is p_c (u_c - m) with m = p . u.
//
// Where one class holds nearly all of p, m is nearly its u, and what remains of the difference is the small part of the
// others. So the largest class stays out of the sums: with S and U the sums of e_j and e_j u_j over the other classes,
// and a the u of the largest, a - m = (a S - U) / (1 + S), and m is kept as a sum of two numbers. The sums are in
// double: an error that all e_j share cancels between S and U, but their rounding would not, and would be as large as u
// where the result is as small as the spread of u.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math/half.h"
#include "math/platform.h"

namespace nestopt {

// Rows of u and logits, whose elements lie next to each other; strides between rows count elements.
struct SoftmaxHessianRows {
  void* u;
  const void* logits;
  const void* weights;
  bool weights_are_double;
  int64_t rows;
  int64_t classes;
  int64_t u_stride;
  int64_t logits_stride;
  int64_t weights_stride;

  NESTOPT_HD double weight(int64_t row) const {
    const int64_t at = row * weights_stride;
    return weights_are_double ? static_cast<const double*>(weights)[at]
                              : double{static_cast<const float*>(weights)[at]};
  }
  template <class V>
  NESTOPT_HD V* u_row(int64_t row) const {
    return static_cast<V*>(u) + row * u_stride;
  }
  template <class A>
  NESTOPT_HD const A* logits_row(int64_t row) const {
    return static_cast<const A*>(logits) + row * logits_stride;
  }
};

// e^x for x <= 0 or NaN, to 1.2 units in the last place, as a loop over it vectorizes. Below 2^-126 it is 0.
NESTOPT_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer, in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  x = -104.0f > x ? -104.0f : x;
  const float rounded = x * 1.44269504f + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // the first product is exact
  // 1 + r + r^2 q(r), where q minimizes the largest relative error, 4e-9.
  float p = 0x1.6a2256p-10f;
  p = p * r + 0x1.123b04p-7f;
  p = p * r + 0x1.5558f8p-5f;
  p = p * r + 0x1.55549p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(bits_of(rounded) - bits_of(kRound)) + 127;
  return p * float_of(static_cast<uint32_t>(exponent > 0 ? exponent : 0) << 23);
#endif
}

NESTOPT_HD double exp_nonpositive(double x) { return exp(x); }

// The logit of a class that is left out.
template <class T>
constexpr T kLeftOut = -std::numeric_limits<T>::infinity();

// What is kept of the classes that were met so far.
template <class T>
struct SoftmaxSums {
  T largest;        // logit; -infinity before the first finite one
  T head;           // the u of that class
  double others;    // over the other classes: the sum of e_j = exp(z_j - largest),
  double weighted;  // and of e_j u_j

  static NESTOPT_HD SoftmaxSums none() { return {kLeftOut<T>, T(0), 0.0, 0.0}; }
};

// The factor from exponentials relative to `from` to those relative to `to`.
template <class T>
NESTOPT_HD T rescaling(T from, T to) {
  return from == kLeftOut<T> ? T(0) : exp_nonpositive(from - to);
}

template <class T>
NESTOPT_HD void include(SoftmaxSums<T>& sums, T z, T u) {
  const bool rises = z > sums.largest;
  const double e = rescaling(rises ? sums.largest : z, rises ? z : sums.largest);
  if (rises) {
    sums = {z, u, e * (sums.others + 1), e * (sums.weighted + double{sums.head})};
  } else {
    sums.others += e;
    sums.weighted += e * double{u};
  }
}

template <class T>
NESTOPT_HD SoftmaxSums<T> join(const SoftmaxSums<T>& a, const SoftmaxSums<T>& b) {
  const bool first = a.largest >= b.largest;
  const SoftmaxSums<T>& high = first ? a : b;
  const SoftmaxSums<T>& low = first ? b : a;
  const double e = rescaling(low.largest, high.largest);
  return {high.largest, high.head, high.others + e * (low.others + 1),
          high.weighted + e * (low.weighted + double{low.head})};
}

// What the second reading of a row needs.
template <class T>
struct SoftmaxRow {
  T largest;
  T scale;      // weight / sum of e_j
  T mean_high;  // the mean of u under p is mean_high + mean_low
  T mean_low;
};

template <class T>
NESTOPT_HD SoftmaxRow<T> finish(const SoftmaxSums<T>& sums, double weight) {
  const double total =
      (double{sums.largest} - double{sums.largest} + 1) + sums.others;  // NaN if the largest is infinite
  const double gap = (double{sums.head} * sums.others - sums.weighted) / total;
  const T high = static_cast<T>(double{sums.head} - gap);
  return {sums.largest, static_cast<T>(weight / total), high, static_cast<T>((double{sums.head} - double{high}) - gap)};
}

// One class, from e = exp(z - largest). Where p is 0 so is the result, unless u is not finite: the difference might
// overflow.
template <class T>
NESTOPT_HD T softmax_hessian(const SoftmaxRow<T>& row, T e, T u) {
  const T deviation = (u - row.mean_high) - row.mean_low;
  return e * row.scale * (e > T(0) ? deviation : u);
}

}  // namespace nestopt
