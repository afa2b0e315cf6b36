#include "test_list.h"

#include <algorithm>
#include <cstring>
#include <numeric>

int64_t Shape::numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>()); }

int64_t Shape::shift(size_t operand) const { return shifts[std::min(operand, shifts.size() - 1)]; }

std::vector<int64_t> Shape::stride(size_t operand) const {
  if (!strides.empty()) return strides[std::min(operand, strides.size() - 1)];
  std::vector<int64_t> dense(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    dense[d] = step;
    step *= sizes[d];
  }
  return dense;
}

std::vector<int64_t> Shape::offsets(size_t operand) const {
  const std::vector<int64_t> strides = stride(operand);
  std::vector<int64_t> offsets(numel());
  for (int64_t n = 0; n < numel(); ++n) {
    int64_t rest = n;
    for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) offsets[n] += rest % sizes[d] * strides[d];
  }
  return offsets;
}

GuardedTensor::GuardedTensor(const Shape& shape, size_t operand, size_t element_size)
    : offsets_(shape.offsets(operand)), first_(kGuard + shape.shift(operand) * element_size) {
  const int64_t elements = offsets_.empty() ? 0 : *std::max_element(offsets_.begin(), offsets_.end()) + 1;
  size_ = first_ + elements * element_size + kGuard;
  bytes_.reset(static_cast<unsigned char*>(::operator new[](size_, std::align_val_t{kGuard})));
  std::memset(bytes_.get(), 0xff, size_);
}

int64_t GuardedTensor::difference(const GuardedTensor& other) const {
  if (std::memcmp(bytes_.get(), other.bytes_.get(), size_) == 0) return kSame;
  const unsigned char* const end = bytes_.get() + size_;
  return std::mismatch(bytes_.get(), const_cast<unsigned char*>(end), other.bytes_.get()).first - data();
}

namespace {

std::vector<Shape> flat_shapes(int64_t chunk) {
  std::vector<Shape> shapes;
  for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{7}, int64_t{8}, int64_t{9}, int64_t{31}, int64_t{257},
                    chunk - 1, chunk, chunk + 1, 2 * chunk + 13}) {
    shapes.push_back({{n}});
  }
  shapes.push_back({{}});
  shapes.push_back({{3, 0, 5}});
  shapes.push_back({{5, 7, 11}});
  const std::vector<std::vector<int64_t>> all_shifts = {{1},    {4},       {8},          {1, 0},
                                                        {0, 1}, {0, 0, 1}, {0, 1, 2, 3}, {7, 5, 3, 1}};
  for (size_t i = 0; i < all_shifts.size(); ++i) {
    // Addresses and the ends of chunks meet in every third.
    shapes.push_back({{i % 3 == 0 ? chunk + 21 : 277}, {}, all_shifts[i]});
    shapes.push_back({{5}, {}, all_shifts[i]});
  }
  return shapes;
}

std::vector<Shape> strided_shapes(int64_t chunk, size_t read_only) {
  const int64_t rows = chunk / 64 + 3;  // of 65, just over a chunk
  std::vector<Shape> shapes = {
      {{rows, 65}, {{65, 1}, {1, rows}}},                  // the second is transposed
      {{rows, 65}, {{1, rows}, {65, 1}}},                  // the first is
      {{2, 3, 5, 7}, {{105, 1, 21, 3}, {105, 35, 7, 1}}},  // channels last and contiguous
      {{37}, {{2}, {1}, {3}}, {1, 0, 2}},                  // gaps
      {{13, 11}, {{30, 2}}},                               // the same gaps in all
      {{4, 1, 6}, {{6, 99, 1}, {1, 1, 4}}},                // a size of 1
      {{1, 1}, {{7, 3}, {1, 5}}},                          // one element
      {{}, {{}}},                                          // no dimension
      {{3, 0, 2}, {{2, 2, 1}, {1, 3, 3}}},                 // nothing
      {{2, 2, 2, 2, 2, 2, 2, 2}, {{128, 64, 32, 16, 8, 4, 2, 1}, {1, 2, 4, 8, 16, 32, 64, 128}}},  // kMaxDims
      {{2, 3, 2, 2, 2, 2, 2, 2, 2, 3},                                                             // more than kMaxDims
       {{1152, 384, 192, 96, 48, 24, 12, 6, 3, 1}, {1, 2, 6, 12, 24, 48, 96, 192, 384, 768}}},
  };
  for (const std::vector<int64_t>& expanded : {std::vector<int64_t>{0, 1}, {1, 0}, {0, 0}}) {
    Shape shape{{19, 23}, {}};
    for (size_t k = 0; k < 4; ++k) shape.strides.push_back(k == read_only ? expanded : std::vector<int64_t>{23, 1});
    shapes.push_back(shape);
  }
  return shapes;
}

}  // namespace

std::vector<Shape> all_shapes(int64_t chunk, size_t read_only) {
  std::vector<Shape> shapes = flat_shapes(chunk);
  for (Shape& shape : strided_shapes(chunk, read_only)) shapes.push_back(std::move(shape));
  return shapes;
}
