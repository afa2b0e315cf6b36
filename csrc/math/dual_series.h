// The Neumann series in the span of the rows: the tensors of one call, and the formulas of one row and of one term. The
// definition is dual_series_ in nestopt_ext/_reference.py. All arithmetic is in double.
#pragma once

#include <cstdint>

#include "math/platform.h"

namespace nestopt {

// Strides count elements. The elements of a row of gram are next to each other.
struct DualSeries {
  void* coefficients;
  void* sq_norms;
  const void* gram;
  const void* weights;
  const void* projections;
  int64_t rows;
  int64_t terms;  // K; sq_norms has one element more
  int64_t coefficients_stride;
  int64_t sq_norms_stride;
  int64_t gram_stride;
  int64_t weights_stride;
  int64_t projections_stride;

  template <class V>
  NESTOPT_HD V& coefficient(int64_t i) const {
    return static_cast<V*>(coefficients)[i * coefficients_stride];
  }
  template <class V>
  NESTOPT_HD V& sq_norm(int64_t j) const {
    return static_cast<V*>(sq_norms)[j * sq_norms_stride];
  }
  template <class G>
  NESTOPT_HD const G* gram_row(int64_t i) const {
    return static_cast<const G*>(gram) + i * gram_stride;
  }
  template <class V>
  NESTOPT_HD double weight(int64_t i) const {
    return static_cast<const V*>(weights)[i * weights_stride];
  }
  template <class V>
  NESTOPT_HD double projection(int64_t i) const {
    return static_cast<const V*>(projections)[i * projections_stride];
  }
};

struct DualSeriesScalars {
  double alpha;
  double q;  // 1 - alpha * damping
};

NESTOPT_HD DualSeriesScalars dual_series_scalars(double alpha, double damping) { return {alpha, 1 - alpha * damping}; }

// One row: d is its inner product with the term, c its coefficient in the term, total the sum of these. e is weight * d
// and f its element of gram @ e.
NESTOPT_HD void advance_row(const DualSeriesScalars& s, double e, double f, double& d, double& c, double& total) {
  c = s.q * c - s.alpha * e;
  d = s.q * d - s.alpha * f;
  total += c;
}

// The squared norm of the next term from that of this one, d . e and e . f. A NaN is not below zero, and stays.
NESTOPT_HD double next_sq_norm(const DualSeriesScalars& s, double sq_norm, double de, double ef) {
  const double next = s.q * s.q * sq_norm - 2 * s.q * s.alpha * de + s.alpha * s.alpha * ef;
  return next < 0 ? 0 : next;
}

}  // namespace nestopt
