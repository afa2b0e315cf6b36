// What every CUDA op needs from torch: the device of its tensors made current, the stream, and numbers without a host
// sync.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/scalar.h"
#include "ops/checks.h"

namespace nestopt::ops {

class CurrentDevice {
 public:
  explicit CurrentDevice(const at::Tensor& t) : guard_(t.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

  // How many blocks that take a whole multiprocessor each can wait for one another; 1 where none can.
  uint32_t blocks_together() const {
    const int device = guard_.current_device().index();
    int can = 0, multiprocessors = 1;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&can, cudaDevAttrCooperativeLaunch, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    return can ? static_cast<uint32_t>(multiprocessors) : 1;
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

inline cuda::Scalar scalar(double value) { return {nullptr, true, value}; }

// A tensor on the CPU is read now; one on the device is read by the kernel, so a captured graph sees its value at
// replay.
inline cuda::Scalar scalar(const at::Tensor& t) {
  if (t.is_cpu()) return scalar(cpu_value(t));
  return {t.const_data_ptr(), t.scalar_type() == at::kDouble, 0.0};
}

}  // namespace nestopt::ops
