// A list of tensors as the kernels see it: addresses, lengths and, where layouts differ, strides. No torch, no
// ownership.
//
// Each entry holds the kOperands tensors that are walked together (a param, its grad, its buffers). An entry is flat
// when all of them are dense with the same strides, so that they are walked as arrays; otherwise it is strided. The
// last operand may be a rider: one address for the whole tensor, of elements of no size, with the strides of the first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace nestopt {

constexpr int kMaxDims = 8;

template <int kOperands>
struct FlatEntry {
  void* data[kOperands];
  int64_t numel;
};

// Dimension 0 is the outermost. Strides count elements of the operand they belong to.
template <int kOperands>
struct StridedEntry {
  void* data[kOperands];
  int64_t numel;
  int ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kOperands][kMaxDims];
};

// Work is cut into chunks that never cross a tensor and never depend on the number of threads, so that a sum over
// chunks is the same sum on every run.
constexpr int64_t kChunk = 16384;

inline int64_t num_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

template <int kOperands>
struct TensorList {
  std::vector<FlatEntry<kOperands>> flat;
  std::vector<StridedEntry<kOperands>> strided;
  // Of every flat, then every strided entry; the total at the end.
  std::vector<int64_t> first_chunk;
  std::vector<int64_t> first_element;

  int64_t entries() const { return static_cast<int64_t>(flat.size() + strided.size()); }
  int64_t chunks() const { return first_chunk.empty() ? 0 : first_chunk.back(); }
  int64_t numel() const { return first_element.empty() ? 0 : first_element.back(); }
  int64_t entry_numel(int64_t i) const {
    const int64_t n = static_cast<int64_t>(flat.size());
    return i < n ? flat[i].numel : strided[i - n].numel;
  }

  // To be called once all entries are there.
  void finish() {
    first_chunk.assign(1, 0);
    first_element.assign(1, 0);
    first_chunk.reserve(entries() + 1);
    first_element.reserve(entries() + 1);
    for (int64_t i = 0; i < entries(); ++i) {
      first_chunk.push_back(first_chunk.back() + num_chunks(entry_numel(i)));
      first_element.push_back(first_element.back() + entry_numel(i));
    }
  }

  // The first chunk that starts at or after this element of the whole list. It turns an even split of the elements into
  // a split of the chunks, whatever the mix of small and large tensors.
  int64_t chunk_from(int64_t element) const {
    const int64_t i = std::upper_bound(first_element.begin(), first_element.end(), element) - first_element.begin() - 1;
    return i == entries() ? chunks() : first_chunk[i] + num_chunks(element - first_element[i]);
  }
};

// Adds one strided entry from sizes and per-operand strides of any number of dimensions: sorts the dimensions by the
// stride of the first operand, joins those that are contiguous in every operand, and cuts what still has more than
// kMaxDims into several.
template <int kOperands>
void add_strided(TensorList<kOperands>& list, void* const (&data)[kOperands], const int64_t (&element_sizes)[kOperands],
                 std::vector<int64_t> sizes, std::vector<int64_t> (&strides)[kOperands]) {
  struct Dim {
    int64_t size;
    int64_t stride[kOperands];
  };
  std::vector<Dim> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    if (sizes[d] == 1) continue;
    Dim dim{sizes[d], {}};
    for (int k = 0; k < kOperands; ++k) dim.stride[k] = strides[k][d];
    auto at = dims.begin();
    while (at != dims.end() && at->stride[0] >= dim.stride[0]) ++at;
    dims.insert(at, dim);
  }
  std::vector<Dim> joined;
  for (const Dim& dim : dims) {
    bool joins = !joined.empty();
    for (int k = 0; k < kOperands && joins; ++k) joins = joined.back().stride[k] == dim.stride[k] * dim.size;
    if (!joins) {
      joined.push_back(dim);
      continue;
    }
    joined.back().size *= dim.size;
    for (int k = 0; k < kOperands; ++k) joined.back().stride[k] = dim.stride[k];
  }

  const size_t outer = joined.size() > kMaxDims ? joined.size() - kMaxDims : 0;
  StridedEntry<kOperands> entry{};
  entry.numel = 1;
  for (size_t d = outer; d < joined.size(); ++d) {
    entry.sizes[entry.ndim] = joined[d].size;
    for (int k = 0; k < kOperands; ++k) entry.strides[k][entry.ndim] = joined[d].stride[k];
    ++entry.ndim;
    entry.numel *= joined[d].size;
  }
  if (entry.ndim == 0) {  // one element
    entry.ndim = 1;
    entry.sizes[0] = 1;
    for (int k = 0; k < kOperands; ++k) entry.strides[k][0] = 1;
  }
  std::vector<int64_t> index(outer, 0);
  for (;;) {
    for (int k = 0; k < kOperands; ++k) {
      int64_t offset = 0;
      for (size_t d = 0; d < outer; ++d) offset += index[d] * joined[d].stride[k];
      entry.data[k] = static_cast<char*>(data[k]) + offset * element_sizes[k];
    }
    list.strided.push_back(entry);
    size_t d = outer;
    while (d > 0 && ++index[d - 1] == joined[d - 1].size) index[--d] = 0;
    if (d == 0) break;
  }
}

}  // namespace nestopt
