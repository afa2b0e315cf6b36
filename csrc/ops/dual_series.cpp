// dual_series_: checks, layout, dtype, then the kernel of the device. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <string>

#include "cpu/dual_series.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/rows.h"
#if defined(NESTOPT_WITH_CUDA)
#include <ATen/ops/empty.h>

#include "cuda/dual_series.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

struct Arguments {
  const at::Tensor* coefficients;
  const at::Tensor* sq_norms;
  const at::Tensor* gram;
  const at::Tensor* weights;
  const at::Tensor* projections;
  const at::Tensor* alpha;
  double damping;
};

void check(const Arguments& a, ListCheck& checks) {
  checks.finite("damping", a.damping);
  checks.leading("coefficients", *a.coefficients, kReal);
  checks.rank("coefficients", *a.coefficients, 1, "the rows");
  checks.vector("sq_norms", *a.sq_norms, "that of v");
  const int64_t rows = a.coefficients->size(0);
  checks.shaped("gram", *a.gram, {rows, rows}, "a row and a column for each of coefficients");
  checks.following("weights", *a.weights, same_dtype, false);
  checks.following("projections", *a.projections, same_dtype, false);
  checks.scalar("alpha", a.alpha, false, true);
  checks.memory();
  if (a.alpha->is_cpu()) checks.finite("alpha", cpu_value(*a.alpha));
}

// Calls visit(G{}, V{}) with the types of the gram and of the vectors.
template <class Visit>
void visit_dtypes(const Arguments& a, Visit visit) {
  const bool wide = a.coefficients->scalar_type() == at::kDouble;
  if (a.gram->scalar_type() == at::kDouble) {
    if (wide) return visit(double{}, double{});
    return visit(double{}, float{});
  }
  if (wide) return visit(float{}, double{});
  visit(float{}, float{});
}

void run_cpu(const Arguments& a, const DualSeries& series) {
  constexpr int64_t kGrain = 131072;  // elements of the gram that are worth a thread
  visit_dtypes(a, [&](auto gram_type, auto vector_type) {
    cpu::DualSeriesTerms<decltype(gram_type), decltype(vector_type)> terms(
        series, dual_series_scalars(cpu_value(*a.alpha), a.damping));
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, terms.kRowBlock * series.rows));
    for (int64_t j = 0; j < series.terms; ++j) {
      at::parallel_for(0, terms.blocks(), grain, [&](int64_t first, int64_t last) { terms.multiply(first, last); });
      terms.advance();
    }
    terms.finish();
  });
}

#if defined(NESTOPT_WITH_CUDA)
void run_cuda(const Arguments& a, const DualSeries& series) {
  const CurrentDevice on(*a.coefficients);
  const cuda::DualSeriesPlan plan = cuda::plan_dual_series(series, on.blocks_together());
  const at::Tensor scratch = at::empty({plan.scratch}, a.coefficients->options().dtype(at::kDouble));
  visit_dtypes(a, [&](auto gram_type, auto vector_type) {
    C10_CUDA_CHECK((cuda::dual_series<decltype(gram_type), decltype(vector_type)>(
        series, scalar(*a.alpha), a.damping, plan, scratch.mutable_data_ptr<double>(), on.stream())));
  });
}
#endif

template <void (*kRun)(const Arguments&, const DualSeries&)>
void dual_series_(BoxedArguments next) {
  const Arguments arguments{
      .coefficients = next.tensor(),
      .sq_norms = next.tensor(),
      .gram = next.tensor(),
      .weights = next.tensor(),
      .projections = next.tensor(),
      .alpha = next.tensor(),
      .damping = next.number(),
  };
  ListCheck checks("dual_series_");
  check(arguments, checks);
  checks.bump_versions();
  const at::AutoDispatchBelowADInplaceOrView copies_are_ours;
  const at::Tensor gram = with_dense_rows(*arguments.gram);
  kRun(arguments, {.coefficients = arguments.coefficients->mutable_data_ptr(),
                   .sq_norms = arguments.sq_norms->mutable_data_ptr(),
                   .gram = gram.const_data_ptr(),
                   .weights = arguments.weights->const_data_ptr(),
                   .projections = arguments.projections->const_data_ptr(),
                   .rows = arguments.coefficients->size(0),
                   .terms = arguments.sq_norms->size(0) - 1,
                   .coefficients_stride = arguments.coefficients->stride(0),
                   .sq_norms_stride = arguments.sq_norms->stride(0),
                   .gram_stride = gram.stride(0),
                   .weights_stride = arguments.weights->stride(0),
                   .projections_stride = arguments.projections->stride(0)});
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "dual_series_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<dual_series_<run_cpu>>(library, "dual_series_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) { implement<dual_series_<run_cuda>>(library, "dual_series_"); }
#endif

}  // namespace nestopt::ops
