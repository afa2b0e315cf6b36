// neumann_step_: checks, layout, dtype, then the kernel of the device. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/neumann.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/collect.h"
#if defined(NESTOPT_WITH_CUDA)
#include <ATen/ops/empty.h>

#include "cuda/neumann.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

struct Arguments {
  TensorRefs v;
  TensorRefs p;
  TensorRefs av;  // or empty: v has been stepped already
  const at::Tensor* alpha;
  double damping;
  const at::Tensor* sq_norm;  // or null
};

void check(const Arguments& a, ListCheck& checks) {
  checks.finite("damping", a.damping);
  checks.leading("v", a.v);
  checks.following("p", a.p, same_dtype, true);
  // A 16-bit series would lose its terms after a few.
  if (!a.av.empty()) checks.following("av", a.av, product_dtypes, false);
  checks.scalar("alpha", a.alpha, false, true);
  checks.scalar("sq_norm", a.sq_norm, true, false);
  checks.memory();
  if (a.alpha->is_cpu()) checks.finite("alpha", cpu_value(*a.alpha));
}

struct Stepped {};  // in place of the dtype of av, where there is none

// Calls visit(V{}, A{}, list) for each pair of dtypes that is there; without av, visit(V{}, Stepped{}, list of v and
// p).
template <class Visit>
void visit_lists(const Arguments& a, Visit visit) {
  for_each_dtype(a.v, [&](at::ScalarType v_dtype, auto v_type) {
    using V = decltype(v_type);
    if (a.av.empty()) {
      const auto list = collect<2>(
          static_cast<int64_t>(a.v.size()), [&](int64_t i) { return a.v[i]->scalar_type() == v_dtype; },
          [&](int64_t i) -> Operands<2> { return {a.v[i], a.p[i]}; });
      if (list.numel() > 0) visit(v_type, Stepped{}, list);
      return;
    }
    const auto visit_products = [&](at::ScalarType av_dtype, auto av_type) {
      const auto keep = [&](int64_t i) {
        return a.v[i]->scalar_type() == v_dtype && a.av[i]->scalar_type() == av_dtype;
      };
      const auto list = collect<3>(static_cast<int64_t>(a.v.size()), keep,
                                   [&](int64_t i) -> Operands<3> { return {a.v[i], a.p[i], a.av[i]}; });
      if (list.numel() > 0) visit(v_type, av_type, list);
    };
    visit_products(v_dtype, v_type);
    if constexpr (std::is_same_v<V, float>) {
      visit_products(at::kBFloat16, BFloat16{});
      visit_products(at::kHalf, Float16{});
    }
  });
}

void run_cpu(const Arguments& a) {
  double sq_norm = 0;
  visit_lists(a, [&](auto v_type, auto av_type, const auto& list) {
    using V = decltype(v_type);
    using A = decltype(av_type);
    using M = math_t<V>;
    const NeumannScalars<M> scalars{static_cast<M>(cpu_value(*a.alpha)), static_cast<M>(a.damping)};
    std::vector<double> sq_norms(a.sq_norm ? list.chunks() : 0);
    double* const norms = sq_norms.empty() ? nullptr : sq_norms.data();
    parallel_chunks(list, [&](int64_t first, int64_t last) {
      if constexpr (std::is_same_v<A, Stepped>) {
        cpu::neumann_sum_chunks<V>(list, first, last, norms);
      } else {
        cpu::neumann_chunks<V, A>(list, first, last, scalars, norms);
      }
    });
    sq_norm = std::accumulate(sq_norms.begin(), sq_norms.end(), sq_norm);
  });
  if (a.sq_norm == nullptr) return;
  if (a.sq_norm->scalar_type() == at::kDouble) {
    *a.sq_norm->mutable_data_ptr<double>() = sq_norm;
  } else {
    *a.sq_norm->mutable_data_ptr<float>() = static_cast<float>(sq_norm);
  }
}

#if defined(NESTOPT_WITH_CUDA)
void run_cuda(const Arguments& a) {
  const CurrentDevice on(*a.v[0]);
  int64_t num_partials = 0;
  if (a.sq_norm) {
    visit_lists(a, [&](auto, auto, const auto& list) { num_partials += cuda::neumann_partials(list); });
  }
  at::Tensor partials;
  double* next = nullptr;
  if (num_partials > 0) {
    partials = at::empty({num_partials}, a.sq_norm->options().dtype(at::kDouble));
    next = partials.mutable_data_ptr<double>();
  }
  visit_lists(a, [&](auto v_type, auto av_type, const auto& list) {
    using V = decltype(v_type);
    using A = decltype(av_type);
    if constexpr (std::is_same_v<A, Stepped>) {
      C10_CUDA_CHECK(cuda::neumann_sum<V>(list, next, on.stream()));
    } else {
      C10_CUDA_CHECK((cuda::neumann<V, A>(list, scalar(*a.alpha), a.damping, next, on.stream())));
    }
    if (next != nullptr) next += cuda::neumann_partials(list);
  });
  if (a.sq_norm == nullptr) return;
  C10_CUDA_CHECK(cuda::sum_partials(num_partials > 0 ? partials.const_data_ptr<double>() : nullptr, num_partials,
                                    a.sq_norm->mutable_data_ptr(), a.sq_norm->scalar_type() == at::kDouble,
                                    on.stream()));
}
#endif

template <void (*kRun)(const Arguments&)>
void neumann_step_(BoxedArguments next) {
  const Arguments arguments{
      .v = next.tensors(),
      .p = next.tensors(),
      .av = next.tensors(),
      .alpha = next.tensor(),
      .damping = next.number(),
      .sq_norm = next.optional_tensor(),
  };
  ListCheck checks("neumann_step_");
  check(arguments, checks);
  if (arguments.v.empty()) {
    if (arguments.sq_norm != nullptr) arguments.sq_norm->zero_();
    return;
  }
  checks.bump_versions();  // now, while the tensors' records are still in the cache
  kRun(arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "neumann_step_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<neumann_step_<run_cpu>>(library, "neumann_step_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) { implement<neumann_step_<run_cuda>>(library, "neumann_step_"); }
#endif

}  // namespace nestopt::ops
