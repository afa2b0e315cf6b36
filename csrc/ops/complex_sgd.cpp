// complex_sgd_step_: checks, layout, dtype, then the kernel of the device. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include "cpu/complex_sgd.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/collect.h"
#if defined(NESTOPT_WITH_CUDA)
#include "cuda/complex_sgd.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

struct Arguments {
  TensorRefs params;
  TensorRefs grads;
  TensorRefs momentum_buffers;
  TensorRefs momentum_buffers_imag;
  const at::Tensor* lr;
  double momentum;
  double momentum_imag;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
  const at::Tensor* grad_scale;  // or null
  const at::Tensor* found_inf;   // or null
};

void check(const Arguments& a, ListCheck& checks) {
  checks.finite("momentum", a.momentum);
  checks.finite("momentum_imag", a.momentum_imag);
  checks.finite("dampening", a.dampening);
  checks.finite("weight_decay", a.weight_decay);
  checks.leading("params", a.params);
  checks.following("grads", a.grads, same_dtype, false);
  const bool needs_buffer = !a.momentum_buffers_imag.empty() || a.momentum != 0 || a.momentum_imag != 0;
  checks.following_or_empty("momentum_buffers", a.momentum_buffers, opmath_dtype, needs_buffer, "momentum is not zero");
  checks.following_or_empty("momentum_buffers_imag", a.momentum_buffers_imag, opmath_dtype, a.momentum_imag != 0,
                            "momentum_imag is not zero");
  checks.scalar("lr", a.lr, false, true);
  checks.scalar("grad_scale", a.grad_scale, false, false);
  checks.scalar("found_inf", a.found_inf, false, false);
  checks.memory();
  if (a.lr->is_cpu()) checks.finite("lr", cpu_value(*a.lr));
}

// Calls visit(T{}, list) for each dtype of the params, with a list of as many operands as there are buffers.
template <class Visit>
void visit_lists(const Arguments& a, Visit visit) {
  const auto n = static_cast<int64_t>(a.params.size());
  for_each_dtype(a.params, [&](at::ScalarType dtype, auto type) {
    const auto keep = [&](int64_t i) { return a.params[i]->scalar_type() == dtype; };
    if (!a.momentum_buffers_imag.empty()) {
      visit(type, collect<4>(n, keep, [&](int64_t i) -> Operands<4> {
              return {a.params[i], a.grads[i], a.momentum_buffers[i], a.momentum_buffers_imag[i]};
            }));
    } else if (!a.momentum_buffers.empty()) {
      visit(type, collect<3>(n, keep, [&](int64_t i) -> Operands<3> {
              return {a.params[i], a.grads[i], a.momentum_buffers[i]};
            }));
    } else {
      visit(type, collect<2>(n, keep, [&](int64_t i) -> Operands<2> { return {a.params[i], a.grads[i]}; }));
    }
  });
}

void run_cpu(const Arguments& a) {
  if (a.found_inf && cpu_value(*a.found_inf) != 0) return;
  const double reciprocal = a.grad_scale ? 1.0 / cpu_value(*a.grad_scale) : 1.0;
  visit_lists(a, [&](auto type, const auto& list) {
    using P = decltype(type);
    using M = math_t<P>;
    const M factor = static_cast<M>(reciprocal);
    const ComplexSgdScalars<M> scalars{
        .lr = static_cast<M>(cpu_value(*a.lr)),
        .momentum = static_cast<M>(a.momentum),
        .momentum_imag = static_cast<M>(a.momentum_imag),
        .gain = static_cast<M>(1 - a.dampening),
        .weight_decay = static_cast<M>(a.weight_decay),
        .grad_factor = a.maximize ? -factor : factor,
        .nesterov = a.nesterov,
    };
    parallel_chunks(list, [&](int64_t first, int64_t last) { cpu::complex_sgd_chunks<P>(list, first, last, scalars); });
  });
}

#if defined(NESTOPT_WITH_CUDA)
void run_cuda(const Arguments& a) {
  const CurrentDevice on(*a.params[0]);
  const cuda::ComplexSgdArguments arguments{
      .lr = scalar(*a.lr),
      .momentum = a.momentum,
      .momentum_imag = a.momentum_imag,
      .dampening = a.dampening,
      .weight_decay = a.weight_decay,
      .nesterov = a.nesterov,
      .maximize = a.maximize,
      .grad_scale = a.grad_scale ? scalar(*a.grad_scale) : scalar(1.0),
      .found_inf = a.found_inf ? scalar(*a.found_inf) : scalar(0.0),
  };
  visit_lists(a, [&](auto type, const auto& list) {
    C10_CUDA_CHECK(cuda::complex_sgd<decltype(type)>(list, arguments, on.stream()));
  });
}
#endif

template <void (*kRun)(const Arguments&)>
void complex_sgd_step_(BoxedArguments next) {
  const Arguments arguments{
      .params = next.tensors(),
      .grads = next.tensors(),
      .momentum_buffers = next.tensors(),
      .momentum_buffers_imag = next.tensors(),
      .lr = next.tensor(),
      .momentum = next.number(),
      .momentum_imag = next.number(),
      .dampening = next.number(),
      .weight_decay = next.number(),
      .nesterov = next.flag(),
      .maximize = next.flag(),
      .grad_scale = next.optional_tensor(),
      .found_inf = next.optional_tensor(),
  };
  ListCheck checks("complex_sgd_step_");
  check(arguments, checks);
  if (arguments.params.empty()) return;
  checks.bump_versions();  // now, while the tensors' records are still in the cache
  kRun(arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "complex_sgd_step_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<complex_sgd_step_<run_cpu>>(library, "complex_sgd_step_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) { implement<complex_sgd_step_<run_cuda>>(library, "complex_sgd_step_"); }
#endif

}  // namespace nestopt::ops
