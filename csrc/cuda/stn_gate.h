#pragma once

#include <cuda_runtime_api.h>

#include "math/half.h"
#include "math/stn_gate.h"

namespace nestopt::cuda {

// All slabs; data are of X, gates of G. Neither allocates nor synchronizes. Returns the error of the launch.
template <class X, class G>
cudaError_t stn_gate(const StnGate& gate, cudaStream_t stream);
template <class X, class G>
cudaError_t stn_gate_backward(const StnGateBackward& backward, cudaStream_t stream);

}  // namespace nestopt::cuda
