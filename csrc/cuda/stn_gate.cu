#include "cuda/stn_gate.cuh"

#include <algorithm>

namespace nestopt::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMaxBlocks = 32768;  // many times what runs at once; more units are taken in turns

uint32_t blocks_for(int64_t units, int64_t units_of_block) {
  return static_cast<uint32_t>(std::min((units + units_of_block - 1) / units_of_block, kMaxBlocks));
}

template <class X, class G, int kRows>
cudaError_t launch_rows(const StnGateBackward& backward, cudaStream_t stream) {
  const StnGateSizes& sizes = backward.sizes;
  const int64_t blocks = (sizes.channels + kStnGateWarp - 1) / kStnGateWarp;
  return launch(stn_gate_backward_rows_kernel<X, G, kRows, kBlock>,
                blocks_for(blocks * sizes.examples * backward.pieces(), kBlock / kStnGateWarp / kRows), kBlock, stream,
                backward);
}

template <class X, class G, int kGroup>
cudaError_t launch_runs(const StnGateBackward& backward, cudaStream_t stream) {
  const StnGateSizes& sizes = backward.sizes;
  return launch(stn_gate_backward_runs_kernel<X, G, kGroup, kBlock>,
                blocks_for(sizes.channels * sizes.examples * backward.pieces(), kBlock / kGroup), kBlock, stream,
                backward);
}

}  // namespace

// Bytes per element: read plain and response, write out; 12 in float32, 6 in 16 bits. Where an example has one position
// there are as many gates as elements: 20 and 10. Two multiplications and three additions at most.
template <class X, class G>
cudaError_t stn_gate(const StnGate& gate, cudaStream_t stream) {
  const StnGateSizes& sizes = gate.sizes;
  if (sizes.examples * sizes.positions() * sizes.slab() == 0) return cudaSuccess;
  const int64_t chunks = (sizes.slab() + kStnGateChunk - 1) / kStnGateChunk;
  return launch(stn_gate_kernel<X, G, kBlock>,
                blocks_for(chunks * sizes.examples * sizes.positions(), kBlock / kStnGateWarp), kBlock, stream, gate);
}

// Bytes per element: read grad and response, write both products of the stacked gradient; 16 in float32, 8 in 16 bits.
// Where an example has one position there are as many gates as elements and twice as many sums: 28 in float32.
template <class X, class G>
cudaError_t stn_gate_backward(const StnGateBackward& backward, cudaStream_t stream) {
  const StnGateSizes& sizes = backward.sizes;
  if (sizes.examples * sizes.positions() * sizes.slab() == 0) return cudaSuccess;
  cudaError_t error;
  if (sizes.run > 1) {
    error = sizes.run <= 1024 ? launch_runs<X, G, 32>(backward, stream) : launch_runs<X, G, kBlock>(backward, stream);
  } else {
    error = sizes.positions() <= 8 ? launch_rows<X, G, 1>(backward, stream) : launch_rows<X, G, 8>(backward, stream);
  }
  if (error == cudaSuccess && backward.partials != nullptr) {
    error = launch(stn_gate_partials_kernel<math_t<X>, kBlock>, blocks_for(backward.num_sums(), kBlock), kBlock, stream,
                   backward);
  }
  if (error != cudaSuccess || backward.shared == nullptr) return error;
  return launch(stn_gate_fold_kernel<math_t<X>, G, kBlock>, blocks_for(sizes.channels, kStnGateWarp), kBlock, stream,
                backward);
}

#define NESTOPT_INSTANTIATE(X, G)                                    \
  template cudaError_t stn_gate<X, G>(const StnGate&, cudaStream_t); \
  template cudaError_t stn_gate_backward<X, G>(const StnGateBackward&, cudaStream_t);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(BFloat16, float)
NESTOPT_INSTANTIATE(Float16, Float16)
NESTOPT_INSTANTIATE(Float16, float)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cuda
