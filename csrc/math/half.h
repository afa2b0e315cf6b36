// The two 16-bit floating types as plain bits, with conversions that round to nearest even.
//
// Written without branches so that a loop over them vectorizes. bfloat16 is the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/platform.h"

namespace nestopt {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

NESTOPT_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

NESTOPT_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// Arithmetic is done in the math type: float for the 16-bit types, else the type itself.
template <class T>
struct MathType {
  using type = T;
};
template <>
struct MathType<BFloat16> {
  using type = float;
};
template <>
struct MathType<Float16> {
  using type = float;
};
template <class T>
using math_t = typename MathType<T>::type;

NESTOPT_HD float load(float x) { return x; }
NESTOPT_HD double load(double x) { return x; }
NESTOPT_HD float load(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }

NESTOPT_HD float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t{static_cast<uint16_t>(x.bits & 0x8000u)} << 16;
  const uint32_t magnitude = uint32_t{static_cast<uint16_t>(x.bits & 0x7fffu)} << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + 0x38000000u;      // rebias 15 -> 127
  const uint32_t special = normal + 0x38000000u;        // infinity, NaN: exponent 255
  const float smallest_normal = float_of(0x38800000u);  // 2^-14
  const uint32_t subnormal = bits_of(float_of(magnitude + 0x38800000u) - smallest_normal);
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return float_of(sign | (exponent == 0x0f800000u ? special : finite));
#endif
}

template <class T>
NESTOPT_HD T store(math_t<T> x);

template <>
NESTOPT_HD float store<float>(float x) {
  return x;
}

template <>
NESTOPT_HD double store<double>(double x) {
  return x;
}

template <>
NESTOPT_HD BFloat16 store<BFloat16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  return BFloat16{static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

template <>
NESTOPT_HD Float16 store<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // Below 2^-14 the result is a multiple of 2^-24, the spacing of floats at 0.5: adding 0.5 rounds to it.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return Float16{static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
#endif
}

}  // namespace nestopt
