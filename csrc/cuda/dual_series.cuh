// One launch for all terms. Every term needs the whole of the one before it, so the threads meet at a barrier after
// each.
//
// One block, for up to 256 rows: 256 KB of gram in float32, which one multiprocessor can read from the second-level
// cache in some 3 us, about what a barrier of a whole grid takes. More rows are spread over a block on each
// multiprocessor, as a cooperative launch, where a term takes as long as a barrier while gram stays in the second-level
// cache (some 3000 rows in float32 on an H100) and is bound by memory beyond. Any number of rows is right. These are
// estimates from bandwidths: no device has been timed.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/dual_series.h"
#include "cuda/launch.cuh"
#include "math/dual_series.h"

namespace nestopt::cuda {

constexpr uint32_t kSeriesThreads = 1024;
constexpr int kSeriesWarp = 32;
constexpr int64_t kOneBlockRows = 256;

// So many rows have their e in shared memory; beyond, it is read from the caches.
constexpr int64_t kStagedRows = 4096;

// The sums of how many terms block 0 adds up at once at the end.
constexpr int64_t kTermTile = 256;

// What the terms hand on: e twice, since a block may be a term ahead of another, then d, c and total, and for each term
// and block its parts of d . e and e . f.
constexpr int64_t series_scratch(int64_t rows, int64_t terms, int64_t blocks) { return 5 * rows + 2 * terms * blocks; }

struct SeriesArguments {
  DualSeries series;
  Scalar alpha;
  double damping;
  double* scratch;
};

__device__ __forceinline__ double warp_sum(double x) {
  for (int step = 1; step < kSeriesWarp; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

template <bool kGrid>
__device__ __forceinline__ void all_blocks_meet() {
  if constexpr (kGrid) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
}

// kThreads and kStaged are the constants above but in tests. A warp has kRows neighbouring rows at a time, the same
// ones in every term, and its first lanes one of them each. Where there is a grid, rows are fewer than warps or little
// more, and one at a time keeps more warps busy.
template <class G, class V, bool kGrid, uint32_t kThreads = kSeriesThreads, int64_t kStaged = kStagedRows>
__global__ void __launch_bounds__(kThreads) dual_series_kernel(const SeriesArguments __grid_constant__ arguments) {
  constexpr int kRows = kGrid ? 1 : 2;
  constexpr int kWarps = kThreads / kSeriesWarp;
  static_assert(kThreads % kSeriesWarp == 0 && kWarps <= kSeriesWarp);
  __shared__ double staged[kStaged];
  __shared__ double warp_de[2][kWarps], warp_ef[2][kWarps];
  __shared__ double tile_de[kTermTile], tile_ef[kTermTile];
  const DualSeries& series = arguments.series;
  const DualSeriesScalars scalars = dual_series_scalars(arguments.alpha.get(), arguments.damping);
  const int64_t rows = series.rows;
  double* const d = arguments.scratch + 2 * rows;
  double* const c = d + rows;
  double* const total = c + rows;
  double* const sums = total + rows;
  const int lane = threadIdx.x % kSeriesWarp;
  const int warp = threadIdx.x / kSeriesWarp;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * kRows;
  const int64_t stride = int64_t{gridDim.x} * kWarps * kRows;

  for (int64_t r = first; r < rows; r += stride) {
    const int64_t mine = r + lane;
    if (lane < kRows && mine < rows) {
      d[mine] = series.projection<V>(mine);
      c[mine] = total[mine] = 0;
      arguments.scratch[mine] = series.weight<V>(mine) * d[mine];
    }
  }
  all_blocks_meet<kGrid>();

  for (int64_t j = 0; j < series.terms; ++j) {
    const int parity = static_cast<int>(j % 2);
    const double* e = arguments.scratch + parity * rows;
    double* const next_e = arguments.scratch + (1 - parity) * rows;
    if (rows <= kStaged) {
      for (int64_t i = threadIdx.x; i < rows; i += kThreads) staged[i] = e[i];
      e = staged;
      __syncthreads();
    }
    double de = 0, ef = 0;
    for (int64_t r = first; r < rows; r += stride) {
      const G* gram_rows[kRows];
      double f[kRows] = {};
      for (int k = 0; k < kRows; ++k) gram_rows[k] = series.gram_row<G>(r + k < rows ? r + k : rows - 1);
      for (int64_t at = lane; at < rows; at += kSeriesWarp) {
        const double e_at = e[at];
        for (int k = 0; k < kRows; ++k) f[k] += double{gram_rows[k][at]} * e_at;
      }
      double mine_f = 0;
      for (int k = 0; k < kRows; ++k) {
        const double sum = warp_sum(f[k]);
        if (k == lane) mine_f = sum;
      }
      const int64_t mine = r + lane;
      if (lane < kRows && mine < rows) {
        double mine_d = d[mine], mine_c = c[mine], mine_total = total[mine];
        de += mine_d * e[mine];
        ef += e[mine] * mine_f;
        advance_row(scalars, e[mine], mine_f, mine_d, mine_c, mine_total);
        next_e[mine] = series.weight<V>(mine) * mine_d;
        d[mine] = mine_d;
        c[mine] = mine_c;
        total[mine] = mine_total;
      }
    }
    de = warp_sum(de);
    ef = warp_sum(ef);
    if (lane == 0) {
      warp_de[parity][warp] = de;
      warp_ef[parity][warp] = ef;
    }
    all_blocks_meet<kGrid>();
    if (warp == 0) {  // the others are at the next term, and write to the other half
      de = warp_sum(lane < kWarps ? warp_de[parity][lane] : 0.0);
      ef = warp_sum(lane < kWarps ? warp_ef[parity][lane] : 0.0);
      if (lane == 0) {
        sums[(2 * j + 0) * gridDim.x + blockIdx.x] = de;
        sums[(2 * j + 1) * gridDim.x + blockIdx.x] = ef;
      }
    }
  }

  for (int64_t r = first; r < rows; r += stride) {
    const int64_t mine = r + lane;
    if (lane < kRows && mine < rows) series.coefficient<V>(mine) = static_cast<V>(total[mine]);
  }
  all_blocks_meet<kGrid>();
  if (blockIdx.x != 0) return;
  double sq_norm = series.sq_norm<V>(0);  // of use in thread 0 only
  for (int64_t begin = 0; begin < series.terms; begin += kTermTile) {
    const int64_t length = series.terms - begin < kTermTile ? series.terms - begin : kTermTile;
    for (int64_t j = threadIdx.x; j < length; j += kThreads) {
      const double* const parts = sums + 2 * (begin + j) * gridDim.x;
      double de = 0, ef = 0;
      for (uint32_t block = 0; block < gridDim.x; ++block) {
        de += parts[block];
        ef += parts[gridDim.x + block];
      }
      tile_de[j] = de;
      tile_ef[j] = ef;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int64_t j = 0; j < length; ++j) {
        sq_norm = next_sq_norm(scalars, sq_norm, tile_de[j], tile_ef[j]);
        series.sq_norm<V>(begin + j + 1) = static_cast<V>(sq_norm);
      }
    }
    __syncthreads();  // the next tile is written there
  }
}

}  // namespace nestopt::cuda
