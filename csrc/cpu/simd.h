// Function clones for several instruction sets, chosen when the library is loaded.
#pragma once

// Not under ThreadSanitizer, whose executables crash in the resolvers, and not under compilers other than GCC.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && __GNUC__ >= 12
#define NESTOPT_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NESTOPT_SIMD
#endif

namespace nestopt::cpu {

// The instruction set that the clones above resolve to on this machine.
const char* simd_level();

}  // namespace nestopt::cpu
