// Function clones for several instruction sets, chosen when the library is loaded.
#pragma once

// Not under ThreadSanitizer, whose executables crash in the resolvers, and not under compilers other than GCC.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && __GNUC__ >= 12
#define NESTOPT_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NESTOPT_SIMD
#endif

namespace nestopt::cpu {

// The compiler's vectors, for reductions: it vectorizes those of loops only if it may reorder sums.
template <class T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <class T, int kCount>
using Vector = typename VectorOf<T, kCount>::type;

// The instruction set that the clones above resolve to on this machine.
const char* simd_level();

}  // namespace nestopt::cpu
