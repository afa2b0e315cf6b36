#pragma once

#include <cuda_runtime.h>

#include "cuda/block_sum.cuh"
#include "cuda/launch.cuh"
#include "cuda/stn_gate.h"
#include "math/stn_gate.h"

namespace nestopt::cuda {

constexpr int kStnGateWarp = 32;
constexpr int kStnGateAtOnce = 4;                             // so that enough loads are under way
constexpr int kStnGateChunk = kStnGateAtOnce * kStnGateWarp;  // elements of a slab that a warp takes at once

// A warp for each chunk of a slab. Neighbouring threads take neighbouring elements whatever the alignment of a slab.
template <class X, class G, int kBlock>
__global__ void __launch_bounds__(kBlock) stn_gate_kernel(const StnGate __grid_constant__ gate) {
  using T = math_t<X>;
  constexpr int kWarps = kBlock / kStnGateWarp;
  const StnGateSizes& sizes = gate.sizes;
  const int lane = threadIdx.x % kStnGateWarp;
  const int64_t size = sizes.slab();
  const int64_t chunks = (size + kStnGateChunk - 1) / kStnGateChunk;
  const int64_t units = chunks * sizes.positions() * sizes.examples;
  for (int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / kStnGateWarp; unit < units;
       unit += int64_t{gridDim.x} * kWarps) {
    const int64_t slab = quotient(unit, chunks);
    const int64_t first = (unit - slab * chunks) * kStnGateChunk + lane;
    const int64_t example = quotient(slab, sizes.positions());
    const int64_t position = slab - example * sizes.positions();
    const X* const response = gate.response.at<X>(sizes, example, position);
    const X* const plain = gate.plain.data == nullptr ? nullptr : gate.plain.at<X>(sizes, example, position);
    const G* const gates = gate.gates.row<G>(example);
    T values[kStnGateAtOnce];
    for (int k = 0; k < kStnGateAtOnce; ++k) {
      const int64_t at = first + k * kStnGateWarp;
      if (at >= size) continue;
      const int64_t channel = sizes.run == 1 ? at : quotient(at, sizes.run);
      values[k] = nestopt::stn_gate<T>(plain == nullptr ? T(0) : T(load(plain[at])), load(gates[channel]),
                                       load(response[at]), gate.shift<T, G>(example, channel));
    }
    X* const out = gate.out.to<X>(sizes, example, position);
    for (int k = 0; k < kStnGateAtOnce; ++k) {
      const int64_t at = first + k * kStnGateWarp;
      if (at < size) out[at] = store<X>(values[k]);
    }
  }
}

// What one thread adds up, a few products at a time in their own type.
struct StnGateSums {
  double products = 0;
  double grads = 0;
};

// Some elements of one channel: loads all, then writes and adds up.
template <int kCount, class X, class T>
__device__ __forceinline__ void stn_gate_elements(const X* const (&grads)[kCount], const X* const (&responses)[kCount],
                                                  X* const (&copied)[kCount], X* const (&scaled)[kCount], T gate,
                                                  StnGateSums& sums) {
  X given[kCount];
  T products[kCount], values[kCount];
  for (int k = 0; k < kCount; ++k) {
    given[k] = *grads[k];
    values[k] = load(given[k]);
    products[k] = values[k] * T(load(*responses[k]));
  }
  for (int k = 0; k < kCount; ++k) {
    if (copied[k] != nullptr) *copied[k] = given[k];
    if (scaled[k] != nullptr) *scaled[k] = store<X>(gate * values[k]);
  }
  if constexpr (kCount == 4) {
    sums.products += (products[0] + products[1]) + (products[2] + products[3]);
    sums.grads += (values[0] + values[1]) + (values[2] + values[3]);
  } else {
    static_assert(kCount == 1);
    sums.products += products[0];
    sums.grads += values[0];
  }
}

// kCount elements of one channel, `step` positions of an example apart.
template <int kCount, class X, class T>
__device__ __forceinline__ void stn_gate_positions(const StnGateBackward& backward, int64_t example, int64_t position,
                                                   int64_t step, int64_t at, T gate, StnGateSums& sums) {
  const StnGateSizes& sizes = backward.sizes;
  const X *grads[kCount], *responses[kCount];
  X *copied[kCount], *scaled[kCount];
  for (int k = 0; k < kCount; ++k) {
    const int64_t p = position + k * step;
    grads[k] = backward.grad.at<X>(sizes, example, p) + at;
    responses[k] = backward.response.at<X>(sizes, example, p) + at;
    copied[k] = backward.copied.data == nullptr ? nullptr : backward.copied.to<X>(sizes, example, p) + at;
    scaled[k] = backward.scaled.data == nullptr ? nullptr : backward.scaled.to<X>(sizes, example, p) + at;
  }
  stn_gate_elements<kCount, X, T>(grads, responses, copied, scaled, gate, sums);
}

// For channels that lie innermost: a thread for each channel of an example, and kRows of them, in warps of their own,
// take its positions in turns.
template <class X, class G, int kRows, int kBlock>
__global__ void __launch_bounds__(kBlock)
    stn_gate_backward_rows_kernel(const StnGateBackward __grid_constant__ backward) {
  using T = math_t<X>;
  constexpr int kWarps = kBlock / kStnGateWarp;
  static_assert(kRows == 1 || kRows == kWarps);
  constexpr int kTogether = kWarps / kRows;  // units
  const StnGateSizes& sizes = backward.sizes;
  const int lane = threadIdx.x % kStnGateWarp, warp = threadIdx.x / kStnGateWarp;
  const int row = kRows == 1 ? 0 : warp;
  const int64_t blocks = (sizes.channels + kStnGateWarp - 1) / kStnGateWarp;
  const int64_t units = blocks * sizes.examples * backward.pieces();
  for (int64_t unit = int64_t{blockIdx.x} * kTogether + (kRows == 1 ? warp : 0); unit < units;
       unit += int64_t{gridDim.x} * kTogether) {
    const int64_t pair = quotient(unit, blocks);
    const int64_t channel = (unit - pair * blocks) * kStnGateWarp + lane;
    const int64_t piece = quotient(pair, sizes.examples);
    const int64_t example = pair - piece * sizes.examples;
    const bool mine = channel < sizes.channels;
    StnGateSums sums;
    if (mine) {
      const T gate = backward.gate<G>(example, channel);
      const int64_t end = backward.piece_end(piece);
      int64_t position = piece * StnGateBackward::kPiece + row;
      for (; position + 3 * kRows < end; position += 4 * kRows) {
        stn_gate_positions<4, X, T>(backward, example, position, kRows, channel, gate, sums);
      }
      for (; position < end; position += kRows) {
        stn_gate_positions<1, X, T>(backward, example, position, kRows, channel, gate, sums);
      }
    }
    if constexpr (kRows > 1) {
      __shared__ double products[kRows][kStnGateWarp], grads[kRows][kStnGateWarp];
      products[row][lane] = sums.products;
      grads[row][lane] = sums.grads;
      __syncthreads();
      for (int other = 1; row == 0 && other < kRows; ++other) {
        sums.products += products[other][lane];
        sums.grads += grads[other][lane];
      }
      __syncthreads();  // the next unit writes there
    }
    if (mine && row == 0) backward.keep<T>(piece, example, channel, sums.products, sums.grads);
  }
}

// For channels that do not: a group of threads for each channel of an example. Neighbouring threads take neighbouring
// elements.
template <class X, class G, int kGroup, int kBlock>
__global__ void __launch_bounds__(kBlock)
    stn_gate_backward_runs_kernel(const StnGateBackward __grid_constant__ backward) {
  using T = math_t<X>;
  constexpr int kGroups = kBlock / kGroup;
  const StnGateSizes& sizes = backward.sizes;
  const int member = threadIdx.x % kGroup;
  const int64_t units = sizes.channels * sizes.examples * backward.pieces();
  for (int64_t unit = int64_t{blockIdx.x} * kGroups + threadIdx.x / kGroup; unit < units;
       unit += int64_t{gridDim.x} * kGroups) {
    const int64_t pair = quotient(unit, sizes.channels);
    const int64_t channel = unit - pair * sizes.channels;
    const int64_t piece = quotient(pair, sizes.examples);
    const int64_t example = pair - piece * sizes.examples;
    const T gate = backward.gate<G>(example, channel);
    StnGateSums sums;
    for (int64_t position = piece * StnGateBackward::kPiece; position < backward.piece_end(piece); ++position) {
      const int64_t begin = channel * sizes.run;
      const X* const grad = backward.grad.at<X>(sizes, example, position) + begin;
      const X* const response = backward.response.at<X>(sizes, example, position) + begin;
      X* const copied =
          backward.copied.data == nullptr ? nullptr : backward.copied.to<X>(sizes, example, position) + begin;
      X* const scaled =
          backward.scaled.data == nullptr ? nullptr : backward.scaled.to<X>(sizes, example, position) + begin;
      int64_t at = member;
      for (; at + 3 * kGroup < sizes.run; at += 4 * kGroup) {
        const X *grads[4], *responses[4];
        X *copies[4], *products[4];
        for (int k = 0; k < 4; ++k) {
          grads[k] = grad + at + k * kGroup;
          responses[k] = response + at + k * kGroup;
          copies[k] = copied == nullptr ? nullptr : copied + at + k * kGroup;
          products[k] = scaled == nullptr ? nullptr : scaled + at + k * kGroup;
        }
        stn_gate_elements<4, X, T>(grads, responses, copies, products, gate, sums);
      }
      for (; at < sizes.run; at += kGroup) {
        stn_gate_elements<1, X, T>({grad + at}, {response + at}, {copied == nullptr ? nullptr : copied + at},
                                   {scaled == nullptr ? nullptr : scaled + at}, gate, sums);
      }
    }
    sums.products = group_sum<kGroup>(sums.products);
    sums.grads = group_sum<kGroup>(sums.grads);
    if (member == 0) backward.keep<T>(piece, example, channel, sums.products, sums.grads);
  }
}

template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock) stn_gate_partials_kernel(const StnGateBackward __grid_constant__ backward) {
  const int64_t count = backward.num_sums();
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < count; i += int64_t{gridDim.x} * kBlock) {
    backward.add_partials<T>(i);
  }
}

// A thread for each channel, of which the warps of a block take the examples in turns.
template <class T, class G, int kBlock>
__global__ void __launch_bounds__(kBlock) stn_gate_fold_kernel(const StnGateBackward __grid_constant__ backward) {
  constexpr int kWarps = kBlock / kStnGateWarp;
  const int lane = threadIdx.x % kStnGateWarp, warp = threadIdx.x / kStnGateWarp;
  const int64_t channels = backward.sizes.channels;
  const T* const response_bias = static_cast<const T*>(backward.response_bias);
  __shared__ double of_bias[kWarps][kStnGateWarp], of_response_bias[kWarps][kStnGateWarp];
  for (int64_t begin = int64_t{blockIdx.x} * kStnGateWarp; begin < channels;
       begin += int64_t{gridDim.x} * kStnGateWarp) {
    const int64_t channel = begin + lane;
    double sums[2] = {};
    for (int64_t e = warp; channel < channels && e < backward.sizes.examples; e += kWarps) {
      T& sum = backward.grad_sums<T>(e)[channel];
      sums[0] += sum;
      if (response_bias == nullptr) continue;
      sums[1] += T(load(backward.gates.row<G>(e)[channels + channel])) * sum;
      sum *= response_bias[channel];
    }
    of_bias[warp][lane] = sums[0];
    of_response_bias[warp][lane] = sums[1];
    __syncthreads();
    if (warp == 0 && channel < channels) {
      for (int other = 1; other < kWarps; ++other) {
        sums[0] += of_bias[other][lane];
        sums[1] += of_response_bias[other][lane];
      }
      backward.share<T>(channel, sums[0], sums[1]);
    }
    __syncthreads();  // the next channels write there
  }
}

}  // namespace nestopt::cuda
