// Rows to try the kernels of softmax_hessian on, with their results in extended precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "math/half.h"
#include "math/softmax_hessian.h"

enum class Kind { kPlain, kNearOneHot, kLargeMean, kLeftOut, kNoWeight };
inline constexpr Kind kKinds[] = {Kind::kPlain, Kind::kNearOneHot, Kind::kLargeMean, Kind::kLeftOut, Kind::kNoWeight};

// Rows of all kinds, one after another, with gaps between them that hold NaN and are not to be touched. The arrays end
// with the last element, so that AddressSanitizer sees a step too far.
template <class V, class A>
class SoftmaxHessianCase {
 public:
  using T = nestopt::math_t<V>;
  static constexpr int64_t kRows = 10;

  explicit SoftmaxHessianCase(int64_t classes, int64_t u_gap = 3, int64_t logits_gap = 1)
      : classes_(classes), u_stride_(classes + u_gap), logits_stride_(classes + logits_gap) {
    std::mt19937 random(static_cast<unsigned>(classes));
    std::normal_distribution<double> normal;
    u_.assign(kRows * u_stride_ - u_gap, nestopt::store<V>(T(NAN)));
    logits_.assign(kRows * logits_stride_ - logits_gap, nestopt::store<A>(NAN));
    for (int64_t r = 0; r < kRows; ++r) {
      const Kind k = kind(r);
      weights_.push_back(k == Kind::kNoWeight ? 0.0f : static_cast<float>(0.5 + r));
      if (k == Kind::kNoWeight) continue;  // NaNs stay
      for (int64_t c = 0; c < classes; ++c) {
        double z = 2 * normal(random), x = normal(random);
        if (k == Kind::kNearOneHot && c == classes / 2) z = 40;
        if (k == Kind::kLargeMean) x = 1000 + x;
        if (k == Kind::kLeftOut && c % 3 != 1 && classes > 1) {
          z = -INFINITY;
          x = sizeof(V) == 2 ? 6e4 : 3e38;
        }
        logits_[r * logits_stride_ + c] = nestopt::store<A>(static_cast<nestopt::math_t<A>>(z));
        u_[r * u_stride_ + c] = nestopt::store<V>(static_cast<T>(x));
      }
    }
    before_ = u_;
  }

  nestopt::SoftmaxHessianRows rows() {
    return {u_.data(), logits_.data(), weights_.data(), false, kRows, classes_, u_stride_, logits_stride_, 1};
  }
  const std::vector<V>& u() const { return u_; }

  // Errors are held to weight * p_c * (distance of u from that of the largest class), whatever the size of u.
  void expect_right() const {
    for (int64_t r = 0; r < kRows; ++r) {
      const V* const found = &u_[r * u_stride_];
      if (kind(r) == Kind::kNoWeight) {
        for (int64_t c = 0; c < classes_; ++c) CHECK(nestopt::load(found[c]) == 0, "row", r, "class", c);
      } else {
        expect_right(r, found);
      }
      const V* const gap = found + classes_;
      for (const V* x = gap; r + 1 < kRows && x < gap + (u_stride_ - classes_); ++x) {
        CHECK(std::memcmp(x, &before_[x - u_.data()], sizeof(V)) == 0, "written behind row", r);
      }
    }
  }

 private:
  int64_t classes_, u_stride_, logits_stride_;
  std::vector<V> u_, before_;
  std::vector<A> logits_;
  std::vector<float> weights_;

  static Kind kind(int64_t r) { return kKinds[r % std::size(kKinds)]; }

  void expect_right(int64_t r, const V* found) const {
    using Long = long double;
    const auto z = [&](int64_t c) { return Long{nestopt::load(logits_[r * logits_stride_ + c])}; };
    const auto u = [&](int64_t c) { return Long{nestopt::load(before_[r * u_stride_ + c])}; };
    int64_t top = 0;
    for (int64_t c = 1; c < classes_; ++c) top = z(c) > z(top) ? c : top;
    // Rounding the difference of two logits is an error in p_j of up to |z_j - z_top| units, and there are some
    // roundings more; in the sums they are those of float64.
    const auto units = [&](int64_t c) {
      return 12 + std::abs(z(c) - z(top)) + (sizeof(V) == 8 ? std::sqrt(Long(classes_)) : 0);
    };
    const Long in_double = sizeof(V) == 8 ? 1 : 0x1p-29;
    Long sum = 0, shifted = 0, spread = 0, spread_error = 0;
    for (int64_t c = 0; c < classes_; ++c) {
      const Long e = std::exp(z(c) - z(top)), x = u(c) - u(top);
      sum += e;
      if (e == 0) continue;
      shifted += e * x;
      spread += e * std::abs(x);
      spread_error += e * units(c) * (std::abs(x) + (c == top ? 0 : std::abs(u(top)) * in_double));
    }
    constexpr bool kBfloat16 = std::is_same_v<V, nestopt::BFloat16>;
    const Long rounding = sizeof(V) == 8 ? 0x1p-53 : 0x1p-24;
    const Long stored = sizeof(V) > 2 ? rounding : kBfloat16 ? 0x1p-8 : 0x1p-10;
    const Long smallest = sizeof(V) == 2 && !kBfloat16 ? 0x1p-24 : 0x1p-120;
    for (int64_t c = 0; c < classes_; ++c) {
      const Long e = std::exp(z(c) - z(top)), x = u(c) - u(top), got = nestopt::load(found[c]);
      if (e == 0) {
        CHECK(got == 0, "row", r, "class", c, "of", classes_, got);
        continue;
      }
      const Long scale = weights_[r] * e / sum;
      const Long want = scale * (x - shifted / sum);
      const Long error = (std::abs(x) + spread / sum) * (units(c) * rounding + stored) + spread_error / sum * rounding;
      CHECK(std::abs(got - want) <= scale * error + smallest, "row", r, "class", c, "of", classes_, got, want);
    }
  }
};
