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

  explicit TestList(const std::vector<Shape>& shapes) : shapes_(shapes) {
    for (const Shape& shape : shapes_) allocate(shape, std::index_sequence_for<Ts...>{});
    for (size_t i = 0; i < shapes_.size(); ++i) add_to(list, i, std::index_sequence_for<Ts...>{});
    list.finish();
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    for_each(
        [&](size_t, Ts&... x) { ((x = nestopt::store<Ts>(static_cast<nestopt::math_t<Ts>>(normal(random)))), ...); });
  }

  // The list with one operand more, the address rider(entry).
  template <class Rider>
  nestopt::TensorList<kOperands + 1> with_rider(Rider rider) const {
    nestopt::TensorList<kOperands + 1> ridden;
    for (size_t i = 0; i < shapes_.size(); ++i) add_to(ridden, i, std::index_sequence_for<Ts...>{}, rider(i));
    ridden.finish();
    return ridden;
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
  std::vector<Shape> shapes_;
  std::vector<std::array<GuardedTensor, kOperands>> tensors_;

  template <size_t... k>
  void allocate(const Shape& shape, std::index_sequence<k...>) {
    tensors_.emplace_back(std::array{GuardedTensor(shape, k, sizeof(Ts))...});
  }

  template <int kAll, size_t... k, class... Riders>
  void add_to(nestopt::TensorList<kAll>& to, size_t i, std::index_sequence<k...>, Riders*... riders) const {
    const Shape& shape = shapes_[i];
    if (shape.strides.empty()) {
      to.flat.push_back({{tensors_[i][k].data()..., riders...}, shape.numel()});
      return;
    }
    constexpr int64_t kElementSizes[kAll] = {int64_t{sizeof(Ts)}...};
    void* const data[kAll] = {tensors_[i][k].data()..., riders...};
    std::vector<int64_t> strides[kAll] = {shape.stride(k)...};
    for (int rider = kOperands; rider < kAll; ++rider) strides[rider] = shape.stride(0);
    nestopt::add_strided<kAll>(to, data, kElementSizes, shape.sizes, strides);
  }
};
