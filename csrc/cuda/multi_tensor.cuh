// The walker: applies an op to every element of a TensorList, in as few launches as there can be.
//
// An op is a class with
//   using Operands = cuda::Operands<P, const P, ...>   the element types, const where only read
//   static constexpr uint32_t kMinBlocks               blocks on a multiprocessor, where 4 would leave too few
//   registers struct Arguments                                   what its constructor takes, passed to the kernel by
//   value explicit Op(const Arguments&)                      run by every thread of a block, so that it may hold
//   barriers bool wanted() const                                false where nothing is to be done; the same for every
//   thread void begin_chunk(const void* rider)                run by every thread of the block before each chunk; only
//   if the
//                                                      list has one operand more, an address for each tensor
//   void operator()(P&, const P&, ...)                 one element, in registers
//   void end_chunk(int64_t chunk)                      run by every thread of the block after each chunk
//
// The table of addresses is an argument of the launch, so there is nothing to allocate, to upload or to keep alive, and
// a CUDA graph holds its own copy. A block finds the tensor of a chunk by a binary search, the same in all its threads.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/operand.cuh"
#include "math/platform.h"
#include "math/tensor_list.h"

namespace nestopt::cuda {

// The work is bound by memory: enough bytes must be under way, no multiprocessor may be idle at the end, and a small
// tensor must not hold threads that have nothing to do. Hence many small blocks, of one chunk each. A thread has 2 to 8
// vectors of 16 bytes of a chunk, which pays for finding it. Four blocks on a multiprocessor have at least 32 KB under
// way, about what the memory of an H200 needs to be busy, and leave 64 registers to a thread, so that none is spilled.
constexpr uint32_t kThreads = 256;
constexpr uint32_t kMinBlocks = 4;
constexpr int64_t kDeviceChunk = 4096;

// Many times what runs at once, so that the hardware evens out the load. In longer lists a block takes several chunks.
constexpr uint32_t kMaxBlocks = 32768;

// A launch has room for 32764 bytes of arguments, before CUDA 12.1 for 4096. The op's own need the rest.
#if CUDART_VERSION >= 12010
constexpr size_t kTableBytes = 32000;
#else
constexpr size_t kTableBytes = 3584;
#endif

inline int64_t num_device_chunks(int64_t numel) { return (numel + kDeviceChunk - 1) / kDeviceChunk; }

template <int kOperands>
int64_t num_device_chunks(const TensorList<kOperands>& list) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < list.entries(); ++i) chunks += num_device_chunks(list.entry_numel(i));
  return chunks;
}

// The entries of one launch.
template <class Entry>
struct Table {
  static constexpr int kCapacity = (kTableBytes - 24) / (sizeof(Entry) + sizeof(uint32_t));

  Entry entries[kCapacity];
  uint32_t first_chunk[kCapacity + 1];  // of each entry, the total at the end; 32 bits of chunks are 2^44 elements
  int32_t count;
  int64_t chunks_before;  // in earlier launches

  void clear(int64_t before) {
    first_chunk[0] = 0;
    count = 0;
    chunks_before = before;
  }
  bool full() const { return count == kCapacity; }
  void add(const Entry& entry) {
    entries[count] = entry;
    first_chunk[count + 1] = first_chunk[count] + static_cast<uint32_t>(num_device_chunks(entry.numel));
    ++count;
  }
  NESTOPT_HD uint32_t chunks() const { return first_chunk[count]; }
  NESTOPT_HD int entry_of(uint32_t chunk) const {
    int low = 0;
    for (int high = count; high - low > 1;) {
      const int middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};
static_assert(sizeof(Table<FlatEntry<7>>) <= kTableBytes && sizeof(Table<StridedEntry<7>>) <= kTableBytes);

// Elements [begin, begin + length) of a flat entry.
template <class Op, class... Ts, int kOperands>
__device__ __forceinline__ void run_chunk(Op& op, Operands<Ts...>, const FlatEntry<kOperands>& entry, int64_t begin,
                                          int length) {
  constexpr int kWidth = Operands<Ts...>::kWidth;
  [&]<size_t... k>(std::index_sequence<k...>) {
    const int whole = length - length % kWidth;
    for (int at = threadIdx.x * kWidth; at < whole; at += kThreads * kWidth) {
      apply(op, Operand<Ts, kWidth>(entry.data[k], begin + at)...);
    }
    const int rest = whole + threadIdx.x;
    if (rest < length) apply(op, Operand<Ts, 1>(entry.data[k], begin + rest)...);
  }(std::index_sequence_for<Ts...>{});
}

// Where element `rest`, counted in row-major order, lies in the first operands. Index: any unsigned type that can hold
// numel.
template <class Index, int kOperands, int kWalked>
__device__ __forceinline__ void locate(const StridedEntry<kOperands>& entry, Index rest, int64_t (&offsets)[kWalked]) {
  for (int k = 0; k < kWalked; ++k) offsets[k] = 0;
  for (int d = entry.ndim - 1; d >= 0; --d) {
    const Index size = static_cast<Index>(entry.sizes[d]);
    const Index outer = d > 0 ? rest / size : 0;
    const int64_t index = static_cast<int64_t>(rest - outer * size);
    for (int k = 0; k < kWalked; ++k) offsets[k] += index * entry.strides[k][d];
    rest = outer;
  }
}

// Elements [begin, begin + length) of a strided entry.
template <class Op, class... Ts, int kOperands>
__device__ __forceinline__ void run_chunk(Op& op, Operands<Ts...>, const StridedEntry<kOperands>& entry, int64_t begin,
                                          int length) {
  const bool narrow = entry.numel <= int64_t{UINT32_MAX};  // a 32-bit division is several times faster
  [&]<size_t... k>(std::index_sequence<k...>) {
    for (int at = threadIdx.x; at < length; at += kThreads) {
      int64_t offsets[sizeof...(Ts)];
      if (narrow) {
        locate(entry, static_cast<uint32_t>(begin + at), offsets);
      } else {
        locate(entry, static_cast<uint64_t>(begin + at), offsets);
      }
      apply(op, Operand<Ts, 1>(entry.data[k], offsets[k])...);
    }
  }(std::index_sequence_for<Ts...>{});
}

template <class Op>
constexpr uint32_t min_blocks() {
  if constexpr (requires { Op::kMinBlocks; }) {
    return Op::kMinBlocks;
  } else {
    return kMinBlocks;
  }
}

template <class Op, class Entry>
constexpr bool has_rider = std::extent_v<decltype(Entry::data)> > Op::Operands::kCount;

template <class Op, class Entry>
__global__ void __launch_bounds__(kThreads, min_blocks<Op>())
    multi_tensor_kernel(const Table<Entry> __grid_constant__ table,
                        const typename Op::Arguments __grid_constant__ arguments) {
  Op op(arguments);
  if (!op.wanted()) return;
  const uint32_t chunks = table.chunks();
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int i = table.entry_of(chunk);
    const int64_t begin = int64_t{chunk - table.first_chunk[i]} * kDeviceChunk;
    const int64_t rest = table.entries[i].numel - begin;
    const int length = static_cast<int>(rest < kDeviceChunk ? rest : kDeviceChunk);
    if constexpr (has_rider<Op, Entry>) op.begin_chunk(table.entries[i].data[Op::Operands::kCount]);
    run_chunk(op, typename Op::Operands{}, table.entries[i], begin, length);
    op.end_chunk(table.chunks_before + chunk);
  }
}

// Launches over entries, and adds their chunks to chunks_before.
template <class Op, class Entry>
cudaError_t launch_over(const std::vector<Entry>& entries, const typename Op::Arguments& arguments, cudaStream_t stream,
                        uint32_t max_blocks, int64_t& chunks_before) {
  Table<Entry> table;
  for (size_t i = 0; i < entries.size();) {
    table.clear(chunks_before);
    for (; i < entries.size() && !table.full(); ++i) {
      if (entries[i].numel > 0) table.add(entries[i]);
    }
    if (table.chunks() == 0) continue;
    const uint32_t blocks = std::min(table.chunks(), max_blocks);
    const cudaError_t error = launch(multi_tensor_kernel<Op, Entry>, blocks, kThreads, stream, table, arguments);
    if (error != cudaSuccess) return error;
    chunks_before += table.chunks();
  }
  return cudaSuccess;
}

// Applies Op to a list. A launch has room for 726 flat entries of 4 operands or 85 strided ones, and for more of fewer.
template <class Op, int kOperands>
cudaError_t for_each_element(const TensorList<kOperands>& list, const typename Op::Arguments& arguments,
                             cudaStream_t stream, uint32_t max_blocks = kMaxBlocks) {
  static_assert(kOperands - Op::Operands::kCount == 0 || kOperands - Op::Operands::kCount == 1);
  int64_t chunks_before = 0;
  const cudaError_t error = launch_over<Op>(list.flat, arguments, stream, max_blocks, chunks_before);
  if (error != cudaSuccess) return error;
  return launch_over<Op>(list.strided, arguments, stream, max_blocks, chunks_before);
}

}  // namespace nestopt::cuda
