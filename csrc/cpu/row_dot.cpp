#include "cpu/row_dot.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kSums = 4;      // at once, since an addition takes a few cycles
constexpr int kStrip = 1024;  // columns that are added up in the type of the products

// A strip as an array of the type that arithmetic is done in, in place where it is one.
template <class T, class X>
NESTOPT_HD const T* as_array(int n, const X* x, T* buffer) {
  if constexpr (std::is_same_v<T, X>) {
    return x;
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = load(x[i]);
    return buffer;
  }
}

template <class T>
NESTOPT_HD void add_products(Vector<T, kLanes>& sum, const T* x, const T* y) {
  Vector<T, kLanes> a, b;
  memcpy(&a, x, sizeof a);
  memcpy(&b, y, sizeof b);
  sum += a * b;
}

template <class T>
NESTOPT_HD double strip_dot(int n, const T* x, const T* y) {
  Vector<T, kLanes> sums[kSums] = {};
  int i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) add_products<T>(sums[k], x + i + k * kLanes, y + i + k * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) add_products<T>(sums[0], x + i, y + i);
  double dot = 0;
  for (; i < n; ++i) dot += x[i] * y[i];
  T lanes[kLanes];
  const Vector<T, kLanes> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  memcpy(lanes, &sum, sizeof lanes);
  if (n >= kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) dot += lanes[lane];
  }
  return dot;
}

template <class X>
NESTOPT_SIMD void run_units(const RowDots& dots, int64_t first, int64_t last) {
  using T = math_t<X>;
  T x_buffer[kStrip], y_buffer[kStrip];
  for (int64_t unit = first; unit < last; ++unit) {
    const X* const x = dots.x_of<X>(unit);
    const X* const y = dots.y_of<X>(unit);
    const int64_t size = dots.size_of(unit);
    double dot = 0;
    for (int64_t at = 0; at < size; at += kStrip) {
      const int n = static_cast<int>(std::min<int64_t>(size - at, kStrip));
      dot += strip_dot<T>(n, as_array<T>(n, x + at, x_buffer), as_array<T>(n, y + at, y_buffer));
    }
    dots.keep(unit, dot);
  }
}

}  // namespace

// Bytes per column of a row: read x and y; 8 in float32, 4 in 16 bits. A piece of y that several rows share in turns is
// read from the second-level cache. One multiplication and one addition.
template <class X>
void row_dot_units(const RowDots& dots, int64_t first, int64_t last) {
  run_units<X>(dots, first, last);
}

#define NESTOPT_INSTANTIATE(X) template void row_dot_units<X>(const RowDots&, int64_t, int64_t);
NESTOPT_INSTANTIATE(float)
NESTOPT_INSTANTIATE(double)
NESTOPT_INSTANTIATE(BFloat16)
NESTOPT_INSTANTIATE(Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cpu
