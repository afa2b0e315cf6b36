// A few neighbouring elements of each operand of an op, in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace nestopt::cuda {

constexpr int kVectorBytes = 16;  // the widest access of one thread

// The element types of an op, const where only read.
template <class... Ts>
struct Operands {
  static constexpr int kCount = sizeof...(Ts);
  // Elements that a thread takes at once: one vector of the smallest type, several of a larger one.
  static constexpr int kWidth = kVectorBytes / static_cast<int>(std::min({sizeof(Ts)...}));
};

// Loads kWidth elements from data[at] on and, unless T is const, stores them back. By vectors where the address allows
// it, by elements where not: a misaligned operand does not slow the others down, and a thread has the same elements
// either way, so that what it adds up depends on the shapes alone.
template <class T, int kWidth>
class Operand {
 public:
  __device__ __forceinline__ Operand(void* data, int64_t at)
      : address_(static_cast<T*>(data) + at), aligned_(reinterpret_cast<uintptr_t>(data) % alignof(Pack) == 0) {}

  __device__ __forceinline__ void load() {
    if (aligned_) {
      pack_ = *reinterpret_cast<const Pack*>(address_);
    } else {
      for (int i = 0; i < kWidth; ++i) pack_.elements[i] = address_[i];
    }
  }
  __device__ __forceinline__ void store() const {
    if constexpr (!std::is_const_v<T>) {
      if (aligned_) {
        *reinterpret_cast<Pack*>(address_) = pack_;
      } else {
        for (int i = 0; i < kWidth; ++i) address_[i] = pack_.elements[i];
      }
    }
  }
  __device__ __forceinline__ std::remove_const_t<T>& operator[](int i) { return pack_.elements[i]; }

 private:
  struct alignas(kWidth == 1 ? alignof(T) : kVectorBytes) Pack {
    std::remove_const_t<T> elements[kWidth];
  };
  static_assert(sizeof(Pack) == kWidth * sizeof(T));

  T* address_;
  bool aligned_;
  Pack pack_;
};

template <class Op, class... Ts, int kWidth>
__device__ __forceinline__ void apply(Op& op, Operand<Ts, kWidth>... operands) {
  (operands.load(), ...);
  for (int i = 0; i < kWidth; ++i) op(operands[i]...);
  (operands.store(), ...);
}

}  // namespace nestopt::cuda
