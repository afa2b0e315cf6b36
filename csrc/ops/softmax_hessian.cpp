// softmax_hessian_: checks, layout, dtype, then the kernel of the device. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <type_traits>

#include "cpu/softmax_hessian.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/rows.h"
#if defined(NESTOPT_WITH_CUDA)
#include "cuda/softmax_hessian.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

struct Arguments {
  const at::Tensor* u;
  const at::Tensor* logits;
  const at::Tensor* row_weight;
};

void check(const Arguments& a, ListCheck& checks) {
  checks.leading("u", *a.u);
  checks.rank("u", *a.u, 2, "rows and classes");
  checks.following("logits", *a.logits, product_dtypes, false);
  checks.row_numbers("row_weight", *a.row_weight);
  checks.memory();
}

// Calls visit(V{}, A{}) with the types of u and logits.
template <class Visit>
void visit_dtypes(const Arguments& a, Visit visit) {
  const at::ScalarType logits = a.logits->scalar_type();
  switch (a.u->scalar_type()) {
    case at::kDouble:
      return visit(double{}, double{});
    case at::kBFloat16:
      return visit(BFloat16{}, BFloat16{});
    case at::kHalf:
      return visit(Float16{}, Float16{});
    default:
      if (logits == at::kBFloat16) return visit(float{}, BFloat16{});
      if (logits == at::kHalf) return visit(float{}, Float16{});
      return visit(float{}, float{});
  }
}

void run_cpu(const Arguments& a, const SoftmaxHessianRows& rows) {
  constexpr int64_t kGrain = 8192;  // classes that are worth a thread
  visit_dtypes(a, [&](auto u_type, auto logits_type) {
    at::parallel_for(0, rows.rows, std::max<int64_t>(1, kGrain / rows.classes), [&](int64_t first, int64_t last) {
      cpu::softmax_hessian_rows<decltype(u_type), decltype(logits_type)>(rows, first, last);
    });
  });
}

#if defined(NESTOPT_WITH_CUDA)
void run_cuda(const Arguments& a, const SoftmaxHessianRows& rows) {
  const CurrentDevice on(*a.u);
  visit_dtypes(a, [&](auto u_type, auto logits_type) {
    C10_CUDA_CHECK((cuda::softmax_hessian<decltype(u_type), decltype(logits_type)>(rows, on.stream())));
  });
}
#endif

template <void (*kRun)(const Arguments&, const SoftmaxHessianRows&)>
void softmax_hessian_(BoxedArguments next) {
  const Arguments arguments{.u = next.tensor(), .logits = next.tensor(), .row_weight = next.tensor()};
  ListCheck checks("softmax_hessian_");
  check(arguments, checks);
  checks.bump_versions();
  if (arguments.u->numel() == 0) return;
  const at::AutoDispatchBelowADInplaceOrView copies_are_ours;
  const at::Tensor u = with_dense_rows(*arguments.u);
  const at::Tensor logits = with_dense_rows(*arguments.logits);
  const at::Tensor& weights = *arguments.row_weight;
  kRun(arguments, {.u = u.mutable_data_ptr(),
                   .logits = logits.const_data_ptr(),
                   .weights = weights.const_data_ptr(),
                   .weights_are_double = weights.scalar_type() == at::kDouble,
                   .rows = u.size(0),
                   .classes = u.size(1),
                   .u_stride = u.stride(0),
                   .logits_stride = logits.stride(0),
                   .weights_stride = weights.stride(0)});
  if (!u.is_same(*arguments.u)) arguments.u->copy_(u);
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "softmax_hessian_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<softmax_hessian_<run_cpu>>(library, "softmax_hessian_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) { implement<softmax_hessian_<run_cuda>>(library, "softmax_hessian_"); }
#endif

}  // namespace nestopt::ops
