// Walks a range of chunks of a TensorList and hands out runs: for each operand an address and a stride, and a common
// length.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/tensor_list.h"

namespace nestopt::cpu {

template <int kOperands>
struct Run {
  void* data[kOperands];
  int64_t strides[kOperands];  // in elements
  int64_t length;

  template <class T>
  T* at(int operand) const {
    return static_cast<T*>(data[operand]);
  }
  bool dense() const {
    return std::all_of(strides, strides + kOperands, [](int64_t s) { return s == 1; });
  }
};

// One operand of a strided run as an array, in blocks: where its elements are not next to each other they are gathered
// into a buffer, and scattered again after they were updated. The update itself is then the same vector code as for
// dense runs.
constexpr int64_t kBlock = 512;

template <class T>
class Block {
 public:
  Block(T* data, int64_t stride, int64_t length) : data_(data), stride_(stride), length_(length) {
    if (stride_ == 1) return;
    for (int64_t i = 0; i < length_; ++i) buffer_[i] = data_[i * stride_];
  }
  T* get() { return stride_ == 1 ? data_ : buffer_; }
  void put() const {
    if (stride_ == 1) return;
    for (int64_t i = 0; i < length_; ++i) data_[i * stride_] = buffer_[i];
  }

 private:
  T* data_;
  int64_t stride_;
  int64_t length_;
  T buffer_[kBlock];
};

// Elements [begin, end) of one strided entry in row-major order, one run per row of the innermost dimension.
template <int kOperands, class Body>
void for_each_row(const StridedEntry<kOperands>& entry, const int64_t (&sizes)[kOperands], int64_t begin, int64_t end,
                  Body body) {
  const int inner = entry.ndim - 1;
  int64_t index[kMaxDims] = {};
  int64_t rest = begin;
  for (int d = inner; d >= 0; --d) {
    index[d] = rest % entry.sizes[d];
    rest /= entry.sizes[d];
  }
  for (int64_t at = begin; at < end;) {
    Run<kOperands> run;
    run.length = std::min(end - at, entry.sizes[inner] - index[inner]);
    for (int k = 0; k < kOperands; ++k) {
      int64_t offset = 0;
      for (int d = 0; d <= inner; ++d) offset += index[d] * entry.strides[k][d];
      run.data[k] = static_cast<char*>(entry.data[k]) + offset * sizes[k];
      run.strides[k] = entry.strides[k][inner];
    }
    body(run);
    at += run.length;
    index[inner] += run.length;
    for (int d = inner; d > 0 && index[d] == entry.sizes[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Calls body(chunk, run) for chunks [first, last); a chunk of a strided entry may come in several runs, in order.
// element_sizes: bytes of one element of each operand.
template <int kOperands, class Body>
void for_each_run(const TensorList<kOperands>& list, const int64_t (&element_sizes)[kOperands], int64_t first,
                  int64_t last, Body body) {
  const auto& starts = list.first_chunk;
  const int64_t num_flat = static_cast<int64_t>(list.flat.size());
  int64_t i = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
  for (int64_t chunk = first; chunk < last; ++i) {
    for (; chunk < std::min(last, starts[i + 1]); ++chunk) {
      const int64_t begin = (chunk - starts[i]) * kChunk;
      const int64_t end = std::min(begin + kChunk, list.entry_numel(i));
      if (i < num_flat) {
        Run<kOperands> run;
        run.length = end - begin;
        for (int k = 0; k < kOperands; ++k) {
          run.data[k] = static_cast<char*>(list.flat[i].data[k]) + begin * element_sizes[k];
          run.strides[k] = 1;
        }
        body(chunk, run);
      } else {
        for_each_row(list.strided[i - num_flat], element_sizes, begin, end,
                     [&](const Run<kOperands>& run) { body(chunk, run); });
      }
    }
  }
}

}  // namespace nestopt::cpu
