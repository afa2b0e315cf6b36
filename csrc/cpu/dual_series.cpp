#include "cpu/dual_series.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

// Of every sum over rows or columns. Vectors are filled up with zeros to a multiple of it.
constexpr int64_t kLanes = 8;

constexpr size_t kCacheLine = 64;

// Rows that share what is loaded of e; as many sums as hide the latency of an addition.
constexpr int kRowsAtOnce = 4;

enum { kWeights, kE, kF, kD, kC, kTotal, kVectors };

// Reductions are written with the compiler's vectors: it finds those of loops only if it may reorder sums. Not wider
// than this: GCC keeps the sums in memory where a vector is wider than a register, and wider ones would gain little,
// since gram comes from the second-level cache.
constexpr int64_t kVector = 4;
typedef double Vector __attribute__((vector_size(kVector * sizeof(double))));

// Element by element: of __builtin_convertvector GCC 12 makes twice the instructions.
template <class G>
NESTOPT_HD void widen(const G* x, Vector& y) {
  y = Vector{x[0], x[1], x[2], x[3]};
}

// By halves, which takes three additions one after another, not seven.
NESTOPT_HD double sum_of(double (&lanes)[kLanes]) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// f[r] = row r . e for kRows neighbouring rows. A row's sum is the same in whatever company it is taken.
template <int kRows, class G>
NESTOPT_HD void multiply_rows(int64_t columns, const G* gram, int64_t stride, const double* e, double* f) {
  constexpr int64_t kParts = kLanes / kVector;
  Vector sums[kRows][kParts] = {};
  const int64_t whole = columns - columns % kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) {
    Vector e_parts[kParts], x;
    for (int64_t part = 0; part < kParts; ++part) widen(e + at + part * kVector, e_parts[part]);
    for (int r = 0; r < kRows; ++r) {
      for (int64_t part = 0; part < kParts; ++part) {
        widen(gram + r * stride + at + part * kVector, x);
        sums[r][part] += x * e_parts[part];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    double lanes[kLanes];
    memcpy(lanes, sums[r], sizeof lanes);
    for (int64_t at = whole; at < columns; ++at) lanes[at - whole] += double{gram[r * stride + at]} * e[at];
    f[r] = sum_of(lanes);
  }
}

// Rows [first, last) of f = gram @ e; returns their part of e . f.
template <class G>
NESTOPT_SIMD double multiply_block(const DualSeries& series, int64_t first, int64_t last, const double* __restrict e,
                                   double* __restrict f) {
  int64_t i = first;
  for (; i + kRowsAtOnce <= last; i += kRowsAtOnce) {
    multiply_rows<kRowsAtOnce>(series.rows, series.gram_row<G>(i), series.gram_stride, e, f + i);
  }
  for (; i < last; ++i) multiply_rows<1>(series.rows, series.gram_row<G>(i), series.gram_stride, e, f + i);
  double ef = 0;
  for (i = first; i < last; ++i) ef += e[i] * f[i];
  return ef;
}

// e = weights * d; returns d . e.
NESTOPT_HD double weigh(int64_t padded, const double* __restrict weights, const double* __restrict d,
                        double* __restrict e) {
  double lanes[kLanes] = {};
  for (int64_t at = 0; at < padded; at += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      e[at + lane] = weights[at + lane] * d[at + lane];
      lanes[lane] += d[at + lane] * e[at + lane];
    }
  }
  return sum_of(lanes);
}

NESTOPT_SIMD double advance_rows(const DualSeriesScalars s, int64_t padded, const double* __restrict weights,
                                 double* __restrict e, const double* __restrict f, double* __restrict d,
                                 double* __restrict c, double* __restrict total) {
  for (int64_t i = 0; i < padded; ++i) advance_row(s, e[i], f[i], d[i], c[i], total[i]);
  return weigh(padded, weights, d, e);
}

}  // namespace

// Bytes per term: gram once, rows * rows of G; 256 KB for 256 rows in float32, which stay in the second-level cache
// over all terms. The vectors are 48 bytes a row, in the first-level cache.
template <class G, class V>
DualSeriesTerms<G, V>::DualSeriesTerms(const DualSeries& series, const DualSeriesScalars& scalars)
    : series_(series),
      scalars_(scalars),
      blocks_((series.rows + kRowBlock - 1) / kRowBlock),
      padded_((series.rows + kLanes - 1) / kLanes * kLanes),
      memory_(new double[kCacheLine / sizeof(double) + kVectors * padded_ + blocks_]()),
      vectors_(memory_.get() + (0 - reinterpret_cast<uintptr_t>(memory_.get())) % kCacheLine / sizeof(double)),
      sq_norm_(series.sq_norm<V>(0)) {
  for (int64_t i = 0; i < series.rows; ++i) {
    vector(kWeights)[i] = series.weight<V>(i);
    vector(kD)[i] = series.projection<V>(i);
  }
  de_ = weigh(padded_, vector(kWeights), vector(kD), vector(kE));
}

template <class G, class V>
void DualSeriesTerms<G, V>::multiply(int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kRowBlock;
    const int64_t end = std::min(begin + kRowBlock, series_.rows);
    vector(kVectors)[block] = multiply_block<G>(series_, begin, end, vector(kE), vector(kF));
  }
}

template <class G, class V>
void DualSeriesTerms<G, V>::advance() {
  double ef = 0;
  for (int64_t block = 0; block < blocks_; ++block) ef += vector(kVectors)[block];
  sq_norm_ = next_sq_norm(scalars_, sq_norm_, de_, ef);
  series_.sq_norm<V>(++term_) = static_cast<V>(sq_norm_);
  de_ =
      advance_rows(scalars_, padded_, vector(kWeights), vector(kE), vector(kF), vector(kD), vector(kC), vector(kTotal));
}

template <class G, class V>
void DualSeriesTerms<G, V>::finish() const {
  for (int64_t i = 0; i < series_.rows; ++i) series_.coefficient<V>(i) = static_cast<V>(vector(kTotal)[i]);
}

template class DualSeriesTerms<float, float>;
template class DualSeriesTerms<float, double>;
template class DualSeriesTerms<double, float>;
template class DualSeriesTerms<double, double>;

}  // namespace nestopt::cpu
