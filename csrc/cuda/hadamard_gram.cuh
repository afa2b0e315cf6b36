#pragma once

#include <cuda_runtime.h>

#include "cuda/block_sum.cuh"
#include "cuda/hadamard_gram.h"
#include "cuda/launch.cuh"
#include "math/hadamard_gram.h"

namespace nestopt::cuda {

constexpr int kTile = 32;  // rows and columns that a block of threads transposes at once
constexpr int kTileThreads = 256;

// One position. Neighbouring threads write neighbouring entries, of the mirror image too.
template <class D, class G>
__global__ void __launch_bounds__(kTileThreads)
    hadamard_products_kernel(const HadamardGramTile __grid_constant__ tile) {
  constexpr int kStep = kTileThreads / kTile;
  __shared__ G products[kTile][kTile + 1];  // so that a column is in as many banks as a row
  const int lane = threadIdx.x % kTile;
  const int first = threadIdx.x / kTile;
  const int64_t across = (tile.columns + kTile - 1) / kTile;
  const int64_t blocks = (tile.rows + kTile - 1) / kTile * across;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row = block / across * kTile;
    const int64_t column = block % across * kTile;
    if (column + lane < tile.columns) {
      for (int i = first; i < kTile && row + i < tile.rows; i += kStep) {
        const G product = G{tile.x_row<D>(row + i)[column + lane]} * G{tile.y_row<D>(row + i)[column + lane]};
        *tile.entry<G>(row + i, column + lane) += product;
        products[i][lane] = product;
      }
    }
    __syncthreads();
    if (row + lane < tile.rows && row + lane >= tile.mirrored_from) {
      for (int j = first; j < kTile && column + j < tile.columns; j += kStep) {
        *tile.mirror_entry<G>(row + lane, column + j) += products[lane][j];
      }
    }
    __syncthreads();  // the next block writes there
  }
}

// Several positions: a group of threads, a warp or the whole block, for each entry.
template <class D, class G, int kGroup, int kBlock>
__global__ void __launch_bounds__(kBlock) hadamard_sums_kernel(const HadamardGramTile __grid_constant__ tile) {
  constexpr int kGroups = kBlock / kGroup;
  const uint32_t member = threadIdx.x % kGroup;
  const int64_t entries = tile.rows * tile.columns;
  const auto positions = static_cast<uint32_t>(tile.column_positions);
  const uint32_t pairs = static_cast<uint32_t>(tile.row_positions) * positions;  // a panel has fewer than 2^31 elements
  for (int64_t entry = int64_t{blockIdx.x} * kGroups + threadIdx.x / kGroup; entry < entries;
       entry += int64_t{gridDim.x} * kGroups) {
    const int64_t row = entry / tile.columns;
    const int64_t column = entry % tile.columns;
    const D* const x = tile.x_row<D>(row) + column * positions;
    const D* const y = tile.y_row<D>(row) + column * positions;
    double sum = 0;
    for (uint32_t pair = member; pair < pairs; pair += kGroup) {
      const int64_t s = pair / positions;
      const uint32_t t = pair % positions;
      sum += G{x[s * tile.x_stride + t]} * G{y[s * tile.y_stride + t]};
    }
    sum = group_sum<kGroup>(sum);
    if (member == 0) {
      *tile.entry<G>(row, column) += static_cast<G>(sum);
      if (row >= tile.mirrored_from) *tile.mirror_entry<G>(row, column) += static_cast<G>(sum);
    }
  }
}

}  // namespace nestopt::cuda
