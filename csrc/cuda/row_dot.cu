#include "cuda/row_dot.cuh"

#include <algorithm>

namespace nestopt::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMaxBlocks = 32768;  // many times what runs at once; more units are taken in turns

template <class X, int kGroup>
cudaError_t launch_groups(const RowDots& dots, cudaStream_t stream) {
  constexpr int kGroups = kBlock / kGroup;
  const int64_t blocks = std::min((dots.units() + kGroups - 1) / kGroups, kMaxBlocks);
  return launch(row_dot_kernel<X, kGroup, kBlock>, static_cast<uint32_t>(blocks), kBlock, stream, dots);
}

}  // namespace

// Bytes per column of a row: read x and y; 8 in float32, 4 in 16 bits. What rows share of y is read from the
// second-level cache as far as it fits. One multiplication and one addition; an addition in double for four columns.
template <class X>
cudaError_t row_dot(const RowDots& dots, cudaStream_t stream) {
  if (dots.rows == 0 || dots.columns == 0) return cudaSuccess;
  if (dots.columns <= 1024) return launch_groups<X, 32>(dots, stream);
  const cudaError_t error = launch_groups<X, kBlock>(dots, stream);
  if (error != cudaSuccess || dots.partials == nullptr) return error;
  const int64_t blocks = std::min((dots.rows + kBlock - 1) / kBlock, kMaxBlocks);
  return launch(row_dot_partials_kernel<kBlock>, static_cast<uint32_t>(blocks), kBlock, stream, dots);
}

#define NESTOPT_INSTANTIATE(X) template cudaError_t row_dot<X>(const RowDots&, cudaStream_t);
NESTOPT_INSTANTIATE(float)
NESTOPT_INSTANTIATE(double)
NESTOPT_INSTANTIATE(BFloat16)
NESTOPT_INSTANTIATE(Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cuda
