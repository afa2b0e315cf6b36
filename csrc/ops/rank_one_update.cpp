// rank_one_update_: checks, layout, dtype, then the kernel of the device. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <type_traits>

#include "cpu/rank_one_update.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/collect.h"
#if defined(NESTOPT_WITH_CUDA)
#include "cuda/rank_one_update.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

struct Arguments {
  TensorRefs v;
  TensorRefs g;
  const at::Tensor* a;
  const at::Tensor* b;
};

void check(const Arguments& arguments, ListCheck& checks) {
  checks.leading("v", arguments.v);
  checks.following("g", arguments.g, product_dtypes, false);
  checks.scalar("a", arguments.a, false, true);
  checks.scalar("b", arguments.b, false, true);
  checks.memory();
}

// Calls visit(V{}, G{}, list) for each pair of dtypes that is there.
template <class Visit>
void visit_lists(const Arguments& arguments, Visit visit) {
  const TensorRefs &v = arguments.v, &g = arguments.g;
  for_each_dtype(v, [&](at::ScalarType v_dtype, auto v_type) {
    using V = decltype(v_type);
    const auto visit_pair = [&](at::ScalarType g_dtype, auto g_type) {
      const auto keep = [&](int64_t i) { return v[i]->scalar_type() == v_dtype && g[i]->scalar_type() == g_dtype; };
      const auto list =
          collect<2>(static_cast<int64_t>(v.size()), keep, [&](int64_t i) -> Operands<2> { return {v[i], g[i]}; });
      if (list.numel() > 0) visit(v_type, g_type, list);
    };
    visit_pair(v_dtype, v_type);
    if constexpr (std::is_same_v<V, float>) {
      visit_pair(at::kBFloat16, BFloat16{});
      visit_pair(at::kHalf, Float16{});
    }
  });
}

void run_cpu(const Arguments& arguments) {
  const double a = cpu_value(*arguments.a), b = cpu_value(*arguments.b);
  visit_lists(arguments, [&](auto v_type, auto g_type, const auto& list) {
    using V = decltype(v_type);
    using M = math_t<V>;
    const RankOneScalars<M> scalars{static_cast<M>(a), static_cast<M>(b)};
    parallel_chunks(list, [&](int64_t first, int64_t last) {
      cpu::rank_one_update_chunks<V, decltype(g_type)>(list, first, last, scalars);
    });
  });
}

#if defined(NESTOPT_WITH_CUDA)
void run_cuda(const Arguments& arguments) {
  const CurrentDevice on(*arguments.v[0]);
  const cuda::Scalar a = scalar(*arguments.a), b = scalar(*arguments.b);
  visit_lists(arguments, [&](auto v_type, auto g_type, const auto& list) {
    C10_CUDA_CHECK((cuda::rank_one_update<decltype(v_type), decltype(g_type)>(list, a, b, on.stream())));
  });
}
#endif

template <void (*kRun)(const Arguments&)>
void rank_one_update_(BoxedArguments next) {
  const Arguments arguments{.v = next.tensors(), .g = next.tensors(), .a = next.tensor(), .b = next.tensor()};
  ListCheck checks("rank_one_update_");
  check(arguments, checks);
  if (arguments.v.empty()) return;
  checks.bump_versions();  // now, while the tensors' records are still in the cache
  kRun(arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "rank_one_update_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<rank_one_update_<run_cpu>>(library, "rank_one_update_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) { implement<rank_one_update_<run_cuda>>(library, "rank_one_update_"); }
#endif

}  // namespace nestopt::ops
