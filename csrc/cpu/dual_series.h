#pragma once

#include <cstdint>
#include <memory>

#include "math/dual_series.h"

namespace nestopt::cpu {

// The terms of one call, one after another; gram is of G, the vectors of V. For each term multiply() is to be called on
// all blocks of rows, then advance(); finish() writes the coefficients. Sums are in an order that depends on the number
// of rows alone.
template <class G, class V>
class DualSeriesTerms {
 public:
  static constexpr int64_t kRowBlock = 16;

  DualSeriesTerms(const DualSeries& series, const DualSeriesScalars& scalars);

  int64_t blocks() const { return blocks_; }
  void multiply(int64_t first, int64_t last);  // safe from several threads on disjoint ranges
  void advance();
  void finish() const;

 private:
  double* vector(int which) const { return vectors_ + which * padded_; }

  DualSeries series_;
  DualSeriesScalars scalars_;
  int64_t blocks_;
  int64_t padded_;  // length of a vector, filled up with rows of zeros
  std::unique_ptr<double[]> memory_;
  double* vectors_;  // in it, from the next cache line on
  double de_;
  double sq_norm_;
  int64_t term_ = 0;
};

}  // namespace nestopt::cpu
