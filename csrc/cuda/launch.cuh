// Kernel launches as a function, which the C++ tests can provide as well.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace nestopt::cuda {

// Arguments go by address, as the driver wants them: they may be large, and <<<>>> would copy them once more.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), uint32_t blocks, uint32_t threads, cudaStream_t stream,
                   const std::type_identity_t<std::remove_cvref_t<Parameters>>&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), addresses, 0, stream);
}

// The same for blocks that wait for one another; there must not be more of them than can run at once.
template <class... Parameters>
cudaError_t launch_together(void (*kernel)(Parameters...), uint32_t blocks, uint32_t threads, cudaStream_t stream,
                            const std::type_identity_t<std::remove_cvref_t<Parameters>>&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), addresses, 0, stream);
}

}  // namespace nestopt::cuda
