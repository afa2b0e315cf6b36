#include "cuda/softmax_hessian.cuh"

#include <algorithm>

namespace nestopt::cuda {
namespace {

constexpr int64_t kMaxBlocks = 32768;  // many times what runs at once; more rows are taken in turns

template <class V, class A, int kGroup, int kBlock>
cudaError_t launch_groups(const SoftmaxHessianRows& rows, cudaStream_t stream) {
  constexpr int kGroups = kBlock / kGroup;
  const int64_t blocks = std::min((rows.rows + kGroups - 1) / kGroups, kMaxBlocks);
  return launch(softmax_hessian_kernel<V, A, kGroup, kBlock>, static_cast<uint32_t>(blocks), kBlock, stream, rows);
}

}  // namespace

// Bytes per class: read z and u, write u; 12 in float32, 6 in 16 bits. As many bytes are read once more, from the
// second-level cache as far as the rows under way fit into it. One exponential per class and reading.
template <class V, class A>
cudaError_t softmax_hessian(const SoftmaxHessianRows& rows, cudaStream_t stream) {
  if (rows.rows == 0 || rows.classes == 0) return cudaSuccess;
  if (rows.classes <= 1024) return launch_groups<V, A, 32, 256>(rows, stream);
  if (rows.classes <= 16384) return launch_groups<V, A, 256, 256>(rows, stream);
  return launch_groups<V, A, 1024, 1024>(rows, stream);
}

#define NESTOPT_INSTANTIATE(V, A) template cudaError_t softmax_hessian<V, A>(const SoftmaxHessianRows&, cudaStream_t);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(float, BFloat16)
NESTOPT_INSTANTIATE(float, Float16)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(Float16, Float16)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cuda
