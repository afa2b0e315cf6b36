// A number that a kernel reads when it runs, so that it may change without a host synchronization or a new CUDA graph.
#pragma once

#include "math/platform.h"

namespace nestopt::cuda {

// On the device at address, a float or a double; or, where address is null, value.
struct Scalar {
  const void* address = nullptr;
  bool is_double = false;
  double value = 0;

  // To be called on the device when address is not null.
  NESTOPT_HD double get() const {
    if (address == nullptr) return value;
    return is_double ? *static_cast<const double*>(address) : double{*static_cast<const float*>(address)};
  }
};

}  // namespace nestopt::cuda
