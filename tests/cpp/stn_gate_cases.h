// Slabs to try the kernels of stn_gate on, with their results in extended precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "math/half.h"
#include "math/stn_gate.h"

// Around the blocks, strips and pieces of the kernels: short and long runs, one position and many.
inline const std::vector<nestopt::StnGateSizes> kStnGateSizes = {
    {1, 3, 1, 1, 1},    {1, 5, 1, 33, 1},  {1, 2, 1, 1025, 1}, {4, 3, 1, 40, 1},   {1, 2, 70, 31, 1},
    {3, 2, 5, 7, 1},    {1, 3, 1, 5, 4},   {1, 2, 1, 300, 4},  {2, 2, 3, 5, 32},   {1, 2, 1, 3, 33},
    {1, 2, 1, 3, 1100}, {2, 2, 1, 3, 130}, {1, 1, 9000, 2, 1}, {4100, 2, 1, 3, 2}, {1, 150, 1, 300, 1}};

// Slabs have gaps between them that hold NaN and are not to be touched; gates too. The arrays end with the last
// element, so that AddressSanitizer sees a step too far. The outermost dimension has the smallest stride of those
// between slabs.
template <class X, class G>
class StnGateCase {
 public:
  using T = nestopt::math_t<X>;

  explicit StnGateCase(const nestopt::StnGateSizes& sizes)
      : sizes_(sizes), random_(static_cast<unsigned>(sizes.slab())) {
    const int64_t slab = sizes.slab();
    for (std::vector<X>* data : {&plain_, &response_, &grad_}) fill(*data, slab);
    for (std::vector<X>* data : {&out_, &copied_, &scaled_}) {
      data->assign(numbers(), nestopt::store<X>(T(NAN)));
    }
    gates_.assign(sizes.examples * gate_stride() - 1, nestopt::store<G>(NAN));
    for (int64_t e = 0; e < sizes.examples; ++e) {
      for (int64_t c = 0; c < 2 * sizes.channels; ++c) gates_[e * gate_stride() + c] = nestopt::store<G>(g_number());
    }
    for (int64_t c = 0; c < sizes.channels; ++c) {
      bias_.push_back(static_cast<T>(normal_(random_)));
      response_bias_.push_back(static_cast<T>(normal_(random_)));
    }
    sums_.assign(sizes.examples * 2 * sizes.channels, static_cast<T>(NAN));
    shared_.assign(2 * sizes.channels, static_cast<T>(NAN));
  }

  nestopt::StnGate forward(bool plain = true, bool biases = true) {
    return {.sizes = sizes_,
            .out = slabs(out_),
            .plain = plain ? slabs(plain_) : nestopt::StnGateSlabs{},
            .response = slabs(response_),
            .gates = {gates_.data(), gate_stride()},
            .bias = biases ? bias_.data() : nullptr,
            .response_bias = biases ? response_bias_.data() : nullptr};
  }
  // `folded`: with shared and the response bias; the latter alone is left out if `biased` is false.
  nestopt::StnGateBackward backward(bool copied = true, bool scaled = true, bool folded = true, bool biased = true) {
    nestopt::StnGateBackward backward{.sizes = sizes_,
                                      .copied = copied ? slabs(copied_) : nestopt::StnGateSlabs{},
                                      .scaled = scaled ? slabs(scaled_) : nestopt::StnGateSlabs{},
                                      .grad = slabs(grad_),
                                      .response = slabs(response_),
                                      .gates = {scaled || folded ? gates_.data() : nullptr, gate_stride()},
                                      .sums = sums_.data(),
                                      .partials = nullptr,
                                      .shared = folded ? shared_.data() : nullptr,
                                      .response_bias = folded && biased ? response_bias_.data() : nullptr};
    if (backward.pieces() > 1) {
      partials_.assign(backward.pieces() * backward.num_sums(), NAN);
      backward.partials = partials_.data();
    }
    return backward;
  }
  const std::vector<X>& out() const { return out_; }
  const std::vector<T>& sums() const { return sums_; }
  const std::vector<T>& shared() const { return shared_; }

  void expect_forward(bool plain = true, bool biases = true) const {
    for_each([&](int64_t at, int64_t e, int64_t c) {
      const Long product = gate(e, c) * Long{nestopt::load(response_[at])};
      const Long first = plain ? Long{nestopt::load(plain_[at])} : 0;
      const Long bias = biases ? Long{bias_[c]} : 0;
      const Long second = biases ? gate(e, sizes_.channels + c) * Long{response_bias_[c]} : 0;
      const Long size = std::abs(product) + std::abs(first) + std::abs(bias) + std::abs(second);
      expect(out_[at], first + bias + product + second, size, "out", at);
    });
    expect_gaps(out_);
  }
  void expect_backward(bool copied = true, bool scaled = true, bool folded = true, bool biased = true) const {
    std::vector<Long> want(sums_.size()), size(sums_.size());
    for_each([&](int64_t at, int64_t e, int64_t c) {
      const Long g = nestopt::load(grad_[at]), product = g * Long{nestopt::load(response_[at])};
      const int64_t sum = e * 2 * sizes_.channels + c;
      want[sum] += product;
      size[sum] += std::abs(product);
      want[sum + sizes_.channels] += g;
      size[sum + sizes_.channels] += std::abs(g);
      if (copied) CHECK(std::memcmp(&copied_[at], &grad_[at], sizeof(X)) == 0, "copied", at);
      if (scaled) expect(scaled_[at], gate(e, c) * g, std::abs(gate(e, c) * g), "scaled", at);
    });
    for (int64_t c = 0; folded && c < sizes_.channels; ++c) {
      Long shared[2] = {}, shared_size[2] = {};
      for (int64_t e = 0; e < sizes_.examples; ++e) {
        const int64_t sum = (2 * e + 1) * sizes_.channels + c;
        const Long factors[2] = {1, biased ? gate(e, sizes_.channels + c) : 0};
        for (int k : {0, 1}) {
          shared[k] += factors[k] * want[sum];
          shared_size[k] += std::abs(factors[k]) * size[sum];
        }
        if (!biased) continue;
        want[sum] *= response_bias_[c];
        size[sum] *= std::abs(Long{response_bias_[c]});
      }
      for (int k : {0, 1}) {
        const T found = shared_[k * sizes_.channels + c];
        CHECK(std::abs(Long{found} - shared[k]) <= shared_size[k] * 16 * rounding(), "shared", k, c, found, shared[k]);
      }
    }
    for (size_t i = 0; i < sums_.size(); ++i) {
      CHECK(std::abs(Long{sums_[i]} - want[i]) <= size[i] * 16 * rounding(), "sum", i, sums_[i], want[i]);
    }
    expect_gaps(copied_);
    expect_gaps(scaled_);
  }

 private:
  using Long = long double;
  static constexpr int64_t kGap = 3;

  nestopt::StnGateSizes sizes_;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
  std::vector<X> plain_, response_, grad_, out_, copied_, scaled_;
  std::vector<G> gates_;
  std::vector<T> bias_, response_bias_, sums_, shared_;
  std::vector<double> partials_;

  static Long rounding() { return std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24; }
  nestopt::math_t<G> g_number() { return static_cast<nestopt::math_t<G>>(normal_(random_)); }
  int64_t gate_stride() const { return 2 * sizes_.channels + 1; }
  int64_t stride() const { return sizes_.slab() + kGap; }
  int64_t slab_count() const { return sizes_.examples * sizes_.positions(); }
  int64_t numbers() const { return slab_count() * stride() - kGap; }
  Long gate(int64_t e, int64_t c) const { return nestopt::load(gates_[e * gate_stride() + c]); }

  void fill(std::vector<X>& data, int64_t slab) {
    data.assign(numbers(), nestopt::store<X>(T(NAN)));
    for (int64_t s = 0; s < slab_count(); ++s) {
      for (int64_t i = 0; i < slab; ++i) data[s * stride() + i] = nestopt::store<X>(static_cast<T>(normal_(random_)));
    }
  }
  nestopt::StnGateSlabs slabs(std::vector<X>& data) const {
    return {.data = data.data(),
            .outer_stride = stride(),
            .example_stride = stride() * sizes_.outer,
            .middle_stride = stride() * sizes_.outer * sizes_.examples};
  }
  template <class Body>  // of the place, example and channel
  void for_each(Body body) const {
    for (int64_t s = 0; s < slab_count(); ++s) {
      for (int64_t i = 0; i < sizes_.slab(); ++i) {
        body(s * stride() + i, s / sizes_.outer % sizes_.examples, i / sizes_.run);
      }
    }
  }
  void expect(X found, Long want, Long size, const char* what, int64_t at) const {
    const Long stored = sizeof(X) > 2 ? 0 : std::is_same_v<X, nestopt::BFloat16> ? 0x1p-8 : 0x1p-10;
    const Long error = std::abs(Long{nestopt::load(found)} - want);
    CHECK(error <= size * 6 * rounding() + std::abs(want) * stored + 0x1p-24L * (sizeof(X) == 2), what, at,
          nestopt::load(found), want);
  }
  void expect_gaps(const std::vector<X>& data) const {
    for (size_t i = 0; i < data.size(); ++i) {
      if (static_cast<int64_t>(i) % stride() >= sizes_.slab()) {
        CHECK(std::isnan(nestopt::load(data[i])), "written between slabs, at", i);
      }
    }
  }
};
