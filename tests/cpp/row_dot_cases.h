// Rows to try the kernels of row_dot on, with their results in extended precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "math/half.h"
#include "math/row_dot.h"

// Six rows of x and three of y, with gaps between them, and between the elements of out, that hold NaN. The arrays end
// with the last element, so that AddressSanitizer sees a step too far.
template <class X, class Out>
class RowDotCase {
 public:
  static constexpr int64_t kRows = 6, kYRows = 3, kOutStride = 2;

  explicit RowDotCase(int64_t columns, int64_t x_gap = 3, int64_t y_gap = 1)
      : columns_(columns), x_stride_(columns + x_gap), y_stride_(columns + y_gap) {
    std::mt19937 random(static_cast<unsigned>(columns));
    std::normal_distribution<double> normal;
    x_.assign(kRows * x_stride_ - x_gap, missing());
    y_.assign(kYRows * y_stride_ - y_gap, missing());
    out_.assign(kRows * kOutStride - 1, static_cast<Out>(NAN));
    const auto number = [&] { return nestopt::store<X>(static_cast<nestopt::math_t<X>>(normal(random))); };
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < columns; ++c) x_[r * x_stride_ + c] = number();
      out_[r * kOutStride] = static_cast<Out>(normal(random));
    }
    for (int64_t r = 0; r < kYRows; ++r) {
      for (int64_t c = 0; c < columns; ++c) y_[r * y_stride_ + c] = number();
    }
    before_ = out_;
  }

  nestopt::RowDots dots() {
    nestopt::RowDots dots{.out = out_.data(),
                          .x = x_.data(),
                          .y = y_.data(),
                          .partials = nullptr,
                          .out_is_double = std::is_same_v<Out, double>,
                          .rows = kRows,
                          .y_rows = kYRows,
                          .columns = columns_,
                          .out_stride = kOutStride,
                          .x_stride = x_stride_,
                          .y_stride = y_stride_};
    if (dots.pieces() > 1) {
      partials_.assign(dots.units(), NAN);
      dots.partials = partials_.data();
    }
    return dots;
  }
  const std::vector<Out>& out() const { return out_; }

  void expect_right() const {
    using Long = long double;
    for (int64_t r = 0; r < kRows; ++r) {
      Long want = before_[r * kOutStride], size = std::abs(want);
      for (int64_t c = 0; c < columns_; ++c) {
        const Long product =
            Long{nestopt::load(x_[r * x_stride_ + c])} * Long{nestopt::load(y_[r % kYRows * y_stride_ + c])};
        want += product;
        size += std::abs(product);
      }
      const Long got = out_[r * kOutStride];
      CHECK(std::abs(got - want) <= size * (std::is_same_v<X, double> ? 0x1p-51 : 0x1p-22), "row", r, "of", columns_,
            "columns", got, want);
      if (r + 1 < kRows) CHECK(std::isnan(out_[r * kOutStride + 1]), "written behind row", r);
    }
  }

 private:
  int64_t columns_, x_stride_, y_stride_;
  std::vector<X> x_, y_;
  std::vector<Out> out_, before_;
  std::vector<double> partials_;

  static X missing() { return nestopt::store<X>(static_cast<nestopt::math_t<X>>(NAN)); }
};
