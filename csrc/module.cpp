// The module nestopt_ext._C: facts about this build. Importing it registers the native kernels; no tensor passes
// through here.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/simd.h"

#if !defined(NESTOPT_CUDA_ARCHS)
#define NESTOPT_CUDA_ARCHS ""
#endif

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown compiler";
#endif

#if defined(NESTOPT_WITH_CUDA)
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

pybind11::dict build_info() {
  pybind11::dict facts;
  facts["compiler"] = kCompiler;
  facts["torch"] = TORCH_VERSION;
  facts["cuda"] = kCuda;
  facts["cuda_archs"] = NESTOPT_CUDA_ARCHS;
  facts["simd"] = nestopt::cpu::simd_level();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of nestopt_ext; importing it registers them with torch's dispatcher.";
  module.def("build_info", build_info, "Facts about this build: compiler, torch, cuda, cuda_archs, simd.");
}
