// Macros that let one formula serve the CPU, CUDA and plain C++ tests.
#pragma once

#if defined(__CUDACC__)
#define NESTOPT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define NESTOPT_HD inline __attribute__((always_inline))
#else
#define NESTOPT_HD inline
#endif
