// What ops on the rows of matrices share.
#pragma once

#include <ATen/core/Tensor.h>

#ifndef _OPENMP
#error "compile with -fopenmp: without it at::parallel_for runs on one thread and says nothing"
#endif

namespace nestopt::ops {

// The elements of a row next to each other, for the kernels; a copy where they are not.
inline at::Tensor with_dense_rows(const at::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

}  // namespace nestopt::ops
