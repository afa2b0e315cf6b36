// row_dot_: checks, layout, dtype, then the kernel of the device. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <vector>

#include "cpu/row_dot.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/rows.h"
#if defined(NESTOPT_WITH_CUDA)
#include <ATen/ops/empty.h>

#include "cuda/row_dot.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

struct Arguments {
  const at::Tensor* out;
  const at::Tensor* x;
  const at::Tensor* y;
};

void check(const Arguments& a, ListCheck& checks) {
  checks.leading("out", *a.out, kReal);
  checks.rank("out", *a.out, 1, "the rows of x");
  const int64_t rows = a.out->size(0);
  checks.operand("x", *a.x, "out", *a.out, factor_dtypes);
  checks.rank("x", *a.x, 2, "rows and columns");
  checks.shape("x", *a.x, a.x->size(0) == rows, "have a row for each element of out, ", rows);
  checks.operand("y", *a.y, "x", *a.x, same_dtype);
  checks.rank("y", *a.y, 2, "rows and columns");
  checks.shape("y", *a.y, a.y->size(1) == a.x->size(1), "have the columns of x, ", a.x->size(1));
  const int64_t y_rows = a.y->size(0);
  checks.shape("y", *a.y, y_rows > 0 ? rows % y_rows == 0 : rows == 0,
               "have a number of rows that divides those of x, ", rows);
  checks.memory();
}

// Calls visit(X{}) with the type of x and y.
template <class Visit>
void visit_dtype(const at::Tensor& x, Visit visit) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return visit(double{});
    case at::kBFloat16:
      return visit(BFloat16{});
    case at::kHalf:
      return visit(Float16{});
    default:
      return visit(float{});
  }
}

void run_cpu(const at::Tensor& x, RowDots dots) {
  constexpr int64_t kGrain = 32768;  // columns that are worth a thread
  std::vector<double> partials(dots.pieces() > 1 ? dots.units() : 0);
  if (!partials.empty()) dots.partials = partials.data();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(dots.columns, RowDots::kPiece));
  visit_dtype(x, [&](auto type) {
    at::parallel_for(0, dots.units(), grain,
                     [&](int64_t first, int64_t last) { cpu::row_dot_units<decltype(type)>(dots, first, last); });
  });
  if (partials.empty()) return;
  for (int64_t row = 0; row < dots.rows; ++row) dots.add_partials(row);
}

#if defined(NESTOPT_WITH_CUDA)
void run_cuda(const at::Tensor& x, RowDots dots) {
  const CurrentDevice on(x);
  at::Tensor partials;
  if (dots.pieces() > 1) {
    partials = at::empty({dots.units()}, x.options().dtype(at::kDouble));
    dots.partials = partials.mutable_data_ptr<double>();
  }
  visit_dtype(x, [&](auto type) { C10_CUDA_CHECK(cuda::row_dot<decltype(type)>(dots, on.stream())); });
}
#endif

template <void (*kRun)(const at::Tensor&, RowDots)>
void row_dot_(BoxedArguments next) {
  const Arguments arguments{.out = next.tensor(), .x = next.tensor(), .y = next.tensor()};
  ListCheck checks("row_dot_");
  check(arguments, checks);
  checks.bump_versions();
  if (arguments.x->numel() == 0) return;
  const at::AutoDispatchBelowADInplaceOrView copies_are_ours;
  const at::Tensor x = with_dense_rows(*arguments.x);
  const at::Tensor y = with_dense_rows(*arguments.y);
  const at::Tensor& out = *arguments.out;
  kRun(x, {.out = out.mutable_data_ptr(),
           .x = x.const_data_ptr(),
           .y = y.const_data_ptr(),
           .partials = nullptr,
           .out_is_double = out.scalar_type() == at::kDouble,
           .rows = x.size(0),
           .y_rows = y.size(0),
           .columns = x.size(1),
           .out_stride = out.stride(0),
           .x_stride = x.stride(0),
           .y_stride = y.stride(0)});
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "row_dot_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<row_dot_<run_cpu>>(library, "row_dot_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) { implement<row_dot_<run_cuda>>(library, "row_dot_"); }
#endif

}  // namespace nestopt::ops
