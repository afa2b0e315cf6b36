// Lists of tensors to try kernels on. Two that were made alike hold the same bytes; a kernel runs on one, a plain loop
// on the other, and then they must hold the same bytes again: results, gaps between strided elements, and guards around
// each tensor, which are all ones (a NaN in every type).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "math/half.h"
#include "math/tensor_list.h"

// One entry. Without strides it is flat. Strides and shifts (of the first element, in elements) are per operand;
// operands that are not given have those of the last one that is.
struct Shape {
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides = {};
  std::vector<int64_t> shifts = {0};

  int64_t numel() const;
  int64_t shift(size_t operand) const;
  std::vector<int64_t> stride(size_t operand) const;
  std::vector<int64_t> offsets(size_t operand) const;  // of every element, the last dimension fastest
};

// Shapes around the sizes where a kernel changes its ways (chunks, vectors, addresses), then shapes whose operands
// differ in their layout, some with the operand `read_only` expanded.
std::vector<Shape> all_shapes(int64_t chunk, size_t read_only);

// The memory of one operand of one entry.
class GuardedTensor {
 public:
  GuardedTensor(const Shape& shape, size_t operand, size_t element_size);

  unsigned char* data() const { return bytes_.get() + first_; }
  int64_t numel() const { return static_cast<int64_t>(offsets_.size()); }
  template <class T>
  T& at(int64_t i) const {
    return reinterpret_cast<T*>(data())[offsets_[i]];
  }

  // The first byte that differs, counted from the first element, or kSame.
  static constexpr int64_t kSame = INT64_MAX;
  int64_t difference(const GuardedTensor& other) const;

 private:
  static constexpr size_t kGuard = 64;
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t{kGuard}); }
  };
  std::vector<int64_t> offsets_;
  size_t first_;
  size_t size_;
  std::unique_ptr<unsigned char[], Free> bytes_;
};

template <class... Ts>
class TestList {
 public:
  static constexpr size_t kOperands = sizeof...(Ts);
  nestopt::TensorList<kOperands> list;

  explicit TestList(const std::vector<Shape>& shapes) {
    for (const Shape& shape : shapes) add(shape, std::index_sequence_for<Ts...>{});
    list.finish();
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    for_each(
        [&](size_t, Ts&... x) { ((x = nestopt::store<Ts>(static_cast<nestopt::math_t<Ts>>(normal(random)))), ...); });
  }

  // Calls body(entry, Ts&...) for every element.
  template <class Body>
  void for_each(Body body) {
    [&]<size_t... k>(std::index_sequence<k...>) {
      for (size_t i = 0; i < tensors_.size(); ++i) {
        for (int64_t n = 0; n < tensors_[i][0].numel(); ++n) body(i, tensors_[i][k].template at<Ts>(n)...);
      }
    }(std::index_sequence_for<Ts...>{});
  }

  template <class... What>
  void expect_same(const TestList& other, const What&... what) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      for (size_t k = 0; k < kOperands; ++k) {
        const int64_t byte = tensors_[i][k].difference(other.tensors_[i][k]);
        CHECK(byte == GuardedTensor::kSame, "in entry", i, "operand", k, "byte", byte, what...);
      }
    }
  }

 private:
  std::vector<std::array<GuardedTensor, kOperands>> tensors_;

  template <size_t... k>
  void add(const Shape& shape, std::index_sequence<k...>) {
    const auto& tensors = tensors_.emplace_back(std::array{GuardedTensor(shape, k, sizeof(Ts))...});
    if (shape.strides.empty()) {
      list.flat.push_back({{tensors[k].data()...}, shape.numel()});
    } else {
      std::vector<int64_t> strides[] = {shape.stride(k)...};
      nestopt::add_strided<kOperands>(list, {tensors[k].data()...}, {int64_t{sizeof(Ts)}...}, shape.sizes, strides);
    }
  }
};
