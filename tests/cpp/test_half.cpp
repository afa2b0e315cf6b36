// Conversions of 16-bit floats, against arithmetic in double that is exact.
#include "math/half.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "check.h"

namespace {

using nestopt::BFloat16;
using nestopt::bits_of;
using nestopt::Float16;
using nestopt::float_of;
using nestopt::load;
using nestopt::store;

struct Format {
  int mantissa;      // bits
  int min_exponent;  // of the smallest normal number
  int max_exponent;
};
constexpr Format format_of(Float16) { return {10, -14, 15}; }
constexpr Format format_of(BFloat16) { return {7, -126, 127}; }

double decode(Format f, uint16_t bits) {
  const int exponent_field = (bits & 0x7fff) >> f.mantissa;
  const int fraction = bits & ((1 << f.mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent_field == f.max_exponent - f.min_exponent + 2) {
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent_field == 0) return sign * std::ldexp(fraction, f.min_exponent - f.mantissa);
  return sign * std::ldexp(fraction + (1 << f.mantissa), exponent_field - 1 + f.min_exponent - f.mantissa);
}

// The value of x rounded to nearest even.
double round_to(Format f, double x) {
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, f.mantissa - exponent)), exponent - f.mantissa);
  const double largest = std::ldexp(2 - std::ldexp(1, -f.mantissa), f.max_exponent);
  return std::abs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class T>
void check_store(float x) {
  const T got = store<T>(x);
  CHECK(same(decode(format_of(T{}), got.bits), round_to(format_of(T{}), x)), x, "became", got.bits);
  if (std::isnan(x)) CHECK(std::signbit(x) == bool(got.bits & 0x8000), bits_of(x));
}

template <class T>
void check_all_values() {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const T x{static_cast<uint16_t>(bits)};
    const float value = load(x);
    CHECK(same(value, decode(format_of(T{}), x.bits)), bits, "became", value);
    const uint16_t back = store<T>(value).bits;
    CHECK(back == bits || (std::isnan(value) && std::isnan(load(T{back}))), bits, "came back as", back);
  }
}

// Halfway between each value and the next one up, and the floats on either side of that.
template <class T>
void check_ties() {
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const float low = load(T{static_cast<uint16_t>(bits)});
    const float high = load(T{static_cast<uint16_t>(bits + 1)});
    if (!std::isfinite(low)) break;
    const float largest_step = std::ldexp(1.0f, format_of(T{}).max_exponent - format_of(T{}).mantissa - 1);
    const float middle =
        std::isfinite(high) ? static_cast<float>((double{low} + double{high}) / 2) : low + largest_step;
    for (float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)}) {
      check_store<T>(x);
      check_store<T>(-x);
    }
    const T tie = store<T>(middle);
    CHECK((tie.bits & 1) == 0, "a tie goes to even:", bits, tie.bits);
  }
}

template <class T>
void check_random() {
  std::mt19937 random(7);
  for (int i = 0; i < 1'000'000; ++i) check_store<T>(float_of(random()));
  std::normal_distribution<float> normal;
  for (int i = 0; i < 100'000; ++i) check_store<T>(std::ldexp(normal(random), static_cast<int>(random() % 60) - 40));
}

template <class T>
void check_special() {
  const float denormal = std::numeric_limits<float>::denorm_min();
  for (float x :
       {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, denormal, -denormal, float_of(0x7f800001u), float_of(0xffffffffu),
        std::numeric_limits<float>::max(), std::numeric_limits<float>::min(), 65504.0f, 65519.996f, 65520.0f,
        std::ldexp(1.0f, -24), std::ldexp(1.0f, -25), std::nextafter(std::ldexp(1.0f, -25), 1.0f)}) {
    check_store<T>(x);
  }
}

TEST(float16_all_values) { check_all_values<Float16>(); }
TEST(bfloat16_all_values) { check_all_values<BFloat16>(); }
TEST(float16_ties) { check_ties<Float16>(); }
TEST(bfloat16_ties) { check_ties<BFloat16>(); }
TEST(float16_random) { check_random<Float16>(); }
TEST(bfloat16_random) { check_random<BFloat16>(); }
TEST(float16_special) { check_special<Float16>(); }
TEST(bfloat16_special) { check_special<BFloat16>(); }

}  // namespace
