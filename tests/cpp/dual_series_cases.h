// A series to try the kernels of dual_series on, with its result in extended precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "math/dual_series.h"

// gram is of G, the vectors of V. Vectors and rows have gaps that hold NaN and are not to be touched. The arrays end
// with the last element, so that AddressSanitizer sees a step too far. Some weights are zero, some negative.
template <class G, class V>
class DualSeriesCase {
 public:
  DualSeriesCase(int64_t rows, int64_t terms, double damping = 0, int64_t gap = 1)
      : rows_(rows), terms_(terms), stride_(1 + gap), damping_(damping), gram_stride_(rows + 2 * gap) {
    std::mt19937 random(static_cast<unsigned>(rows));
    std::normal_distribution<double> normal;
    constexpr int64_t kLength = 5;
    std::vector<double> factors(rows * kLength);
    for (double& x : factors) x = normal(random);
    gram_.assign(rows > 0 ? rows * gram_stride_ - 2 * gap : 0, NAN);
    double largest = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        double dot = 0;
        for (int64_t k = 0; k < kLength; ++k) dot += factors[i * kLength + k] * factors[j * kLength + k];
        gram_[i * gram_stride_ + j] = static_cast<G>(dot);
      }
      largest += gram_[i * gram_stride_ + i];
    }
    alpha_ = 0.5 / (largest + 1);
    for (std::vector<V>* vector : {&coefficients_, &weights_, &projections_})
      vector->assign(rows > 0 ? rows * stride_ - gap : 0, NAN);
    sq_norms_.assign((terms + 1) * stride_ - gap, NAN);
    sq_norms_[0] = static_cast<V>(2 + normal(random));
    for (int64_t i = 0; i < rows; ++i) {
      weights_[i * stride_] = static_cast<V>(i % 5 == 3 ? 0 : i % 7 == 2 ? -0.25 : 0.5 + 0.1 * normal(random));
      projections_[i * stride_] = static_cast<V>(normal(random));
    }
  }

  nestopt::DualSeries series() {
    return {coefficients_.data(),
            sq_norms_.data(),
            gram_.data(),
            weights_.data(),
            projections_.data(),
            rows_,
            terms_,
            stride_,
            stride_,
            gram_stride_,
            stride_,
            stride_};
  }
  double alpha() const { return alpha_; }
  double damping() const { return damping_; }
  G* gram() { return gram_.data(); }

  bool same(const DualSeriesCase& other) const {
    return same_bytes(coefficients_, other.coefficients_) && same_bytes(sq_norms_, other.sq_norms_);
  }
  V sq_norm(int64_t j) const { return sq_norms_[j * stride_]; }
  V coefficient(int64_t i) const { return coefficients_[i * stride_]; }

  void expect_right() const {
    using Long = long double;
    const Long alpha = alpha_, q = 1 - alpha * Long{damping_};
    std::vector<Long> d(rows_), c(rows_), total(rows_), e(rows_), f(rows_);
    for (int64_t i = 0; i < rows_; ++i) d[i] = projections_[i * stride_];
    Long norm = sq_norms_[0], scale = norm;
    const Long rounding = sizeof(V) == 8 ? 1e-13L : 0x1p-23L;
    for (int64_t j = 0; j < terms_; ++j) {
      Long de = 0, ef = 0;
      for (int64_t i = 0; i < rows_; ++i) e[i] = weights_[i * stride_] * d[i];
      for (int64_t i = 0; i < rows_; ++i) {
        f[i] = 0;
        for (int64_t k = 0; k < rows_; ++k) f[i] += gram_[i * gram_stride_ + k] * e[k];
        de += d[i] * e[i];
        ef += e[i] * f[i];
      }
      norm = std::max<Long>(0, q * q * norm - 2 * q * alpha * de + alpha * alpha * ef);
      scale = std::max(scale, norm);
      for (int64_t i = 0; i < rows_; ++i) {
        c[i] = q * c[i] - alpha * e[i];
        d[i] = q * d[i] - alpha * f[i];
        total[i] += c[i];
      }
      const V got = sq_norm(j + 1);
      CHECK(std::abs(got - norm) <= rounding * scale, "rows", rows_, "squared norm", j + 1, got, norm);
    }
    Long largest = 0;
    for (Long x : total) largest = std::max(largest, std::abs(x));
    for (int64_t i = 0; i < rows_; ++i) {
      const V got = coefficient(i);
      CHECK(std::abs(got - total[i]) <= rounding * largest, "rows", rows_, "coefficient", i, got, total[i]);
    }
    expect_gaps(coefficients_);
    expect_gaps(sq_norms_);
  }

 private:
  int64_t rows_, terms_, stride_;
  double damping_, alpha_;
  int64_t gram_stride_;
  std::vector<G> gram_;
  std::vector<V> coefficients_, sq_norms_, weights_, projections_;

  static bool same_bytes(const std::vector<V>& a, const std::vector<V>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(V)) == 0);
  }
  void expect_gaps(const std::vector<V>& vector) const {
    for (size_t i = 0; i < vector.size(); ++i)
      CHECK(static_cast<int64_t>(i) % stride_ == 0 || std::isnan(vector[i]), "written between elements, at", i);
  }
};
