// Turns checked lists of tensors into the torch-free TensorList that the kernels walk, and splits the walk over torch's
// threads.
#pragma once

#include "ops/boxed.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "math/half.h"
#include "math/tensor_list.h"

#ifndef _OPENMP
#error "compile with -fopenmp: without it at::parallel_for runs on one thread and says nothing"
#endif

namespace nestopt::ops {

// The tensors that are walked together; the first of them is written to.
template <int kOperands>
using Operands = std::array<const at::Tensor*, kOperands>;

template <size_t kTensors>
bool walk_as_arrays(const std::array<const at::Tensor*, kTensors>& tensors) {
  if (std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor* t) { return t->is_contiguous(); })) return true;
  const at::Tensor& lead = *tensors[0];
  return lead.is_non_overlapping_and_dense() &&
         std::all_of(tensors.begin() + 1, tensors.end(),
                     [&](const at::Tensor* t) { return t->strides() == lead.strides(); });
}

// `riders`: none, or the one address that the kernel gets beside the tensors.
template <int kOperands, size_t kTensors, class... Riders>
void add_entry(TensorList<kOperands>& list, const std::array<const at::Tensor*, kTensors>& tensors, Riders... riders) {
  static_assert(kTensors + sizeof...(riders) == kOperands);
  const at::Tensor& lead = *tensors[0];
  if (lead.numel() == 0) return;
  void* data[kOperands];
  size_t next = 0;
  for (const at::Tensor* t : tensors) data[next++] = const_cast<void*>(t->const_data_ptr());
  ((data[next++] = const_cast<void*>(static_cast<const void*>(riders))), ...);
  if (walk_as_arrays(tensors)) {
    FlatEntry<kOperands>& entry = list.flat.emplace_back();
    std::copy(std::begin(data), std::end(data), entry.data);
    entry.numel = lead.numel();
    return;
  }
  int64_t element_sizes[kOperands] = {};
  std::vector<int64_t> strides[kOperands];
  for (size_t k = 0; k < kOperands; ++k) {
    if (k < kTensors) element_sizes[k] = static_cast<int64_t>(tensors[k]->itemsize());
    strides[k] = tensors[k < kTensors ? k : 0]->strides().vec();
  }
  add_strided(list, data, element_sizes, lead.sizes().vec(), strides);
}

// Builds the list of the entries i with keep(i); `operands(i)` names the tensors of entry i, and `rider(i)`, if given,
// the address that rides with them.
template <int kOperands, class Keep, class Of, class... Rider>
TensorList<kOperands> collect(int64_t count, Keep keep, Of operands, Rider... rider) {
  TensorList<kOperands> list;
  list.flat.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (keep(i)) add_entry(list, operands(i), rider(i)...);
  }
  list.finish();
  return list;
}

// Calls body(first, last) on ranges of chunks, evenly by elements.
template <int kOperands, class Body>
void parallel_chunks(const TensorList<kOperands>& list, Body body) {
  constexpr int64_t kGrain = 32768;  // elements that are worth a thread
  at::parallel_for(0, list.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { body(list.chunk_from(begin), list.chunk_from(end)); });
}

// Calls visit(T{}) for each floating dtype that is present in the list, T being its C++ type.
template <class Visit>
void for_each_dtype(const TensorRefs& tensors, Visit visit) {
  const auto present = [&](at::ScalarType dtype) {
    return std::any_of(tensors.begin(), tensors.end(), [&](const at::Tensor* t) { return t->scalar_type() == dtype; });
  };
  if (present(at::kFloat)) visit(at::kFloat, float{});
  if (present(at::kDouble)) visit(at::kDouble, double{});
  if (present(at::kBFloat16)) visit(at::kBFloat16, BFloat16{});
  if (present(at::kHalf)) visit(at::kHalf, Float16{});
}

}  // namespace nestopt::ops
