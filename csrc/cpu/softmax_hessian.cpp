#include "cpu/softmax_hessian.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

// A row is walked in pieces that stay in the first-level cache between the loops over them. Every piece is a multiple
// of kLanes long; the last few classes of a row are a piece of their own, filled up with classes of p = 0. So all loops
// run as vectors, those of a row of ten classes too, and the order of the sums depends on the number of classes alone.
constexpr int kLanes = 16;
constexpr int kPiece = 2048;

// The exponentials of a row of no more classes are kept for its second reading; those of a longer one would push it out
// of the second-level cache.
constexpr int64_t kKept = 32 * kPiece;

NESTOPT_HD int piece_at(int64_t at, int64_t classes) {
  const int64_t rest = classes - at;
  const int64_t whole = rest - rest % kLanes;
  return static_cast<int>(std::min<int64_t>(whole > 0 ? whole : rest, kPiece));
}

NESTOPT_HD int padded(int64_t n) { return static_cast<int>((n + kLanes - 1) / kLanes * kLanes); }

// A piece as an array of the type that arithmetic is done in, in place where it is one.
template <class T, class V>
NESTOPT_HD T* as_array(int n, V* x, std::remove_const_t<T>* buffer, T filling) {
  if constexpr (std::is_same_v<std::remove_const_t<V>, std::remove_const_t<T>>) {
    if (n % kLanes == 0) return x;
  }
  for (int i = 0; i < n; ++i) buffer[i] = load(x[i]);
  for (int i = n; i % kLanes != 0; ++i) buffer[i] = filling;
  return buffer;
}

// The largest of those that are not NaN, and where it is first met; -infinity, somewhere, if there is none.
template <class T>
NESTOPT_HD T largest_of(int n, const T* z, int& position) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vector<T, kLanes> largest = Vector<T, kLanes>{} + kLeftOut<T>, next;
  Vector<Index, kLanes> first = {}, at = {};
  for (int i = 0; i < n; i += kLanes) {
    memcpy(&next, z + i, sizeof next);
    const auto rises = next > largest;
    largest = rises ? next : largest;
    first = rises ? at : first;
    at += kLanes;
  }
  T result = largest[0];
  position = static_cast<int>(first[0]);
  for (int lane = 1; lane < kLanes; ++lane) {
    const int here = static_cast<int>(first[lane]) + lane;
    if (largest[lane] > result || (largest[lane] == result && here < position)) {
      result = largest[lane];
      position = here;
    }
  }
  return result;
}

template <class T>
NESTOPT_HD void add_up(int n, const T* e, const T* u, double& others, double& weighted) {
  constexpr int kParts = 2;  // of as many doubles as the widest vector holds
  constexpr int kPart = kLanes / kParts;
  Vector<double, kPart> e_sums[kParts] = {}, eu_sums[kParts] = {};
  for (int i = 0; i < n; i += kLanes) {
    for (int part = 0; part < kParts; ++part) {
      Vector<T, kPart> e_part, u_part;
      memcpy(&e_part, e + i + part * kPart, sizeof e_part);
      memcpy(&u_part, u + i + part * kPart, sizeof u_part);
      const auto e_wide = __builtin_convertvector(e_part, Vector<double, kPart>);
      e_sums[part] += e_wide;
      eu_sums[part] += e_wide * __builtin_convertvector(u_part, Vector<double, kPart>);
    }
  }
  e_sums[0] += e_sums[1];
  eu_sums[0] += eu_sums[1];
  for (int lane = 0; lane < kPart; ++lane) {
    others += e_sums[0][lane];
    weighted += eu_sums[0][lane];
  }
}

// n: a multiple of kLanes. e receives exp(z - sums.largest).
template <class T>
NESTOPT_HD void include_piece(SoftmaxSums<T>& sums, int n, const T* __restrict z, const T* __restrict u,
                              T* __restrict e) {
  int head;
  const T largest = largest_of(n, z, head);
  const bool rises = largest > sums.largest;
  if (rises) {
    const double rescaled = rescaling(sums.largest, largest);
    sums = {largest, u[head], rescaled * (sums.others + 1), rescaled * (sums.weighted + double{sums.head})};
  }
  // Before the first finite logit there are only zeros to add, and NaNs to be seen.
  const T reference = sums.largest == kLeftOut<T> ? T(0) : sums.largest;
  for (int i = 0; i < n; ++i) e[i] = exp_nonpositive(z[i] - reference);
  if (rises) e[head] = 0;
  add_up(n, e, u, sums.others, sums.weighted);
  if (rises) e[head] = 1;
}

template <class V, class A>
NESTOPT_SIMD void update_rows(const SoftmaxHessianRows& rows, int64_t first, int64_t last, bool kept,
                              math_t<V>* exponentials) {
  using T = math_t<V>;
  T z_buffer[kPiece], u_buffer[kPiece], references[kKept / kPiece + 2];
  for (int64_t r = first; r < last; ++r) {
    const double weight = rows.weight(r);
    V* const u = rows.u_row<V>(r);
    const A* const z = rows.logits_row<A>(r);
    if (weight == 0) {
      std::fill(u, u + rows.classes, store<V>(T(0)));
      continue;
    }
    SoftmaxSums<T> sums = SoftmaxSums<T>::none();
    int piece = 0;
    for (int64_t at = 0, n = 0; at < rows.classes; at += n, ++piece) {
      n = piece_at(at, rows.classes);
      const T* const z_piece = as_array<const T>(n, z + at, z_buffer, kLeftOut<T>);
      const T* const u_piece = as_array<const T>(n, u + at, u_buffer, T(0));
      include_piece(sums, padded(n), z_piece, u_piece, exponentials + (kept ? at : 0));
      if (kept) references[piece] = sums.largest;
    }
    const SoftmaxRow<T> row = finish(sums, weight);
    piece = 0;
    for (int64_t at = 0, n = 0; at < rows.classes; at += n, ++piece) {
      n = piece_at(at, rows.classes);
      T* const u_piece = as_array<T>(n, u + at, u_buffer, T(0));
      if (kept) {
        const T rescaled = rescaling(references[piece], row.largest);
        const T* const e = exponentials + at;
        for (int i = 0; i < padded(n); ++i) u_piece[i] = softmax_hessian(row, e[i] * rescaled, u_piece[i]);
      } else {
        const T* const z_piece = as_array<const T>(n, z + at, z_buffer, kLeftOut<T>);
        for (int i = 0; i < padded(n); ++i) {
          u_piece[i] = softmax_hessian(row, exp_nonpositive(z_piece[i] - row.largest), u_piece[i]);
        }
      }
      if (static_cast<void*>(u_piece) == u_buffer) {
        for (int i = 0; i < n; ++i) u[at + i] = store<V>(u_piece[i]);
      }
    }
  }
}

}  // namespace

// Bytes per class: read z and u, write u; 12 in float32. The second reading is from the second-level cache while a row
// has fewer than some 100 000 classes.
template <class V, class A>
void softmax_hessian_rows(const SoftmaxHessianRows& rows, int64_t first, int64_t last) {
  const bool kept = rows.classes <= kKept;
  const auto exponentials = std::make_unique_for_overwrite<math_t<V>[]>(kept ? padded(rows.classes) : kPiece);
  update_rows<V, A>(rows, first, last, kept, exponentials.get());
}

#define NESTOPT_INSTANTIATE(V, A) template void softmax_hessian_rows<V, A>(const SoftmaxHessianRows&, int64_t, int64_t);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(float, BFloat16)
NESTOPT_INSTANTIATE(float, Float16)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(Float16, Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cpu
