// complex_adam_step_: checks, layout, dtype, then the kernel of the device. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <cmath>
#include <type_traits>

#include "cpu/complex_adam.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/collect.h"
#if defined(NESTOPT_WITH_CUDA)
#include "cuda/complex_adam.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

struct Arguments {
  TensorRefs params;
  TensorRefs grads;
  TensorRefs exp_avgs;
  TensorRefs exp_avgs_imag;
  TensorRefs exp_avg_sqs;
  TensorRefs max_exp_avg_sqs;
  TensorRefs steps;
  const at::Tensor* lr;
  double beta1;
  double beta1_imag;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled_weight_decay;
  bool bias_correction;
  bool maximize;
  const at::Tensor* grad_scale;  // or null
  const at::Tensor* found_inf;   // or null

  ComplexAdamOptions options() const {
    return {
        .beta1 = beta1,
        .beta1_imag = beta1_imag,
        .beta2 = beta2,
        .eps = eps,
        .weight_decay = weight_decay,
        .decoupled_weight_decay = decoupled_weight_decay,
        .bias_correction = bias_correction,
        .maximize = maximize,
    };
  }
};

void check(const Arguments& a, ListCheck& checks) {
  checks.finite("beta1", a.beta1);
  checks.finite("beta1_imag", a.beta1_imag);
  checks.finite("beta2", a.beta2);
  checks.finite("eps", a.eps);
  checks.finite("weight_decay", a.weight_decay);
  const double modulus = std::hypot(a.beta1, a.beta1_imag);
  checks.require("beta1", modulus, modulus < 1, "have a modulus below 1");
  checks.require("beta2", a.beta2, 0 <= a.beta2 && a.beta2 < 1, "be in [0, 1)");
  checks.require("eps", a.eps, a.eps >= 0, "not be negative");
  checks.require("beta1_imag", a.beta1_imag, a.beta1_imag == 0 || !a.bias_correction, "be zero with bias_correction",
                 "A complex average does not converge where this momentum does: leave bias_correction off.");
  checks.leading("params", a.params);
  checks.following("grads", a.grads, same_dtype, false);
  checks.following("exp_avgs", a.exp_avgs, opmath_dtype, true);
  checks.following_or_empty("exp_avgs_imag", a.exp_avgs_imag, opmath_dtype, a.beta1_imag != 0,
                            "beta1_imag is not zero");
  checks.following("exp_avg_sqs", a.exp_avg_sqs, opmath_dtype, true);
  if (!a.max_exp_avg_sqs.empty()) checks.following("max_exp_avg_sqs", a.max_exp_avg_sqs, opmath_dtype, true);
  checks.scalars("steps", a.steps);
  checks.scalar("lr", a.lr, false, true);
  checks.scalar("grad_scale", a.grad_scale, false, false);
  checks.scalar("found_inf", a.found_inf, false, false);
  checks.memory();
  if (a.lr->is_cpu()) checks.finite("lr", cpu_value(*a.lr));
}

template <bool kComplex, bool kAmsgrad>
auto walked(const Arguments& a, int64_t i) {
  std::array<const at::Tensor*, complex_adam_operands(kComplex, kAmsgrad) - 1> tensors{a.params[i], a.grads[i],
                                                                                       a.exp_avgs[i]};
  if constexpr (kComplex) tensors[3] = a.exp_avgs_imag[i];
  tensors[3 + kComplex] = a.exp_avg_sqs[i];
  if constexpr (kAmsgrad) tensors[4 + kComplex] = a.max_exp_avg_sqs[i];
  return tensors;
}

// Calls visit(bool_constant<complex>, bool_constant<amsgrad>, list) with the params for which keep(i) holds.
template <class Keep, class Rider, class Visit>
void visit_list(const Arguments& a, Keep keep, Rider rider, Visit visit) {
  const auto with = [&](auto is_complex, auto amsgrad) {
    constexpr bool kComplex = decltype(is_complex)::value, kAmsgrad = decltype(amsgrad)::value;
    visit(is_complex, amsgrad,
          collect<complex_adam_operands(kComplex, kAmsgrad)>(
              static_cast<int64_t>(a.params.size()), keep, [&](int64_t i) { return walked<kComplex, kAmsgrad>(a, i); },
              rider));
  };
  const bool amsgrad = !a.max_exp_avg_sqs.empty();
  if (a.exp_avgs_imag.empty()) {
    amsgrad ? with(std::false_type{}, std::true_type{}) : with(std::false_type{}, std::false_type{});
  } else {
    amsgrad ? with(std::true_type{}, std::true_type{}) : with(std::true_type{}, std::false_type{});
  }
}

double count_up(const at::Tensor& step) {
  return step.scalar_type() == at::kDouble ? *step.mutable_data_ptr<double>() += 1
                                           : *step.mutable_data_ptr<float>() += 1;
}

void run_cpu(const Arguments& a) {
  if (a.found_inf && cpu_value(*a.found_inf) != 0) return;
  ComplexAdamOptions options = a.options();
  options.lr = cpu_value(*a.lr);
  if (a.grad_scale) options.grad_scale = cpu_value(*a.grad_scale);
  std::vector<double> steps;
  steps.reserve(a.steps.size());
  for (const at::Tensor* step : a.steps) steps.push_back(count_up(*step));

  for_each_dtype(a.params, [&](at::ScalarType dtype, auto type) {
    using P = decltype(type);
    using M = math_t<P>;
    std::vector<ComplexAdamScalars<M>> scalars;
    scalars.reserve(steps.size());  // addresses stay
    double known = 0;
    const auto scalars_of = [&](int64_t i) {  // most tensors have the step of the one before
      if (scalars.empty() || steps[i] != known) scalars.push_back(complex_adam_scalars<M>(options, steps[i]));
      known = steps[i];
      return &scalars.back();
    };
    const auto keep = [&](int64_t i) { return a.params[i]->scalar_type() == dtype; };
    visit_list(a, keep, scalars_of, [&](auto is_complex, auto amsgrad, const auto& list) {
      parallel_chunks(list, [&](int64_t first, int64_t last) {
        cpu::complex_adam_chunks<is_complex.value, amsgrad.value, P>(list, first, last);
      });
    });
  });
}

#if defined(NESTOPT_WITH_CUDA)
// Calls visit(dtype, T{}) for each dtype of the steps that is there.
template <class Visit>
void for_each_step_dtype(const Arguments& a, Visit visit) {
  for_each_dtype(a.steps, [&](at::ScalarType dtype, auto type) {
    if constexpr (std::is_same_v<decltype(type), float> || std::is_same_v<decltype(type), double>) visit(dtype, type);
  });
}

void run_cuda(const Arguments& a) {
  const CurrentDevice on(*a.params[0]);
  cuda::ComplexAdamArguments arguments{
      .options = a.options(),
      .lr = scalar(*a.lr),
      .grad_scale = a.grad_scale ? scalar(*a.grad_scale) : scalar(1.0),
      .found_inf = a.found_inf ? scalar(*a.found_inf) : scalar(0.0),
  };
  for_each_step_dtype(a, [&](at::ScalarType step_dtype, auto step_type) {
    const auto steps = collect<1>(
        static_cast<int64_t>(a.steps.size()), [&](int64_t i) { return a.steps[i]->scalar_type() == step_dtype; },
        [&](int64_t i) -> Operands<1> { return {a.steps[i]}; });
    C10_CUDA_CHECK(cuda::count_steps<decltype(step_type)>(steps, arguments.found_inf, on.stream()));
    arguments.step_is_double = step_dtype == at::kDouble;
    for_each_dtype(a.params, [&](at::ScalarType dtype, auto type) {
      const auto keep = [&](int64_t i) {
        return a.params[i]->scalar_type() == dtype && a.steps[i]->scalar_type() == step_dtype;
      };
      const auto step_of = [&](int64_t i) { return a.steps[i]->const_data_ptr(); };
      visit_list(a, keep, step_of, [&](auto is_complex, auto amsgrad, const auto& list) {
        C10_CUDA_CHECK(
            (cuda::complex_adam<is_complex.value, amsgrad.value, decltype(type)>(list, arguments, on.stream())));
      });
    });
  });
}
#endif

template <void (*kRun)(const Arguments&)>
void complex_adam_step_(BoxedArguments next) {
  const Arguments arguments{
      .params = next.tensors(),
      .grads = next.tensors(),
      .exp_avgs = next.tensors(),
      .exp_avgs_imag = next.tensors(),
      .exp_avg_sqs = next.tensors(),
      .max_exp_avg_sqs = next.tensors(),
      .steps = next.tensors(),
      .lr = next.tensor(),
      .beta1 = next.number(),
      .beta1_imag = next.number(),
      .beta2 = next.number(),
      .eps = next.number(),
      .weight_decay = next.number(),
      .decoupled_weight_decay = next.flag(),
      .bias_correction = next.flag(),
      .maximize = next.flag(),
      .grad_scale = next.optional_tensor(),
      .found_inf = next.optional_tensor(),
  };
  ListCheck checks("complex_adam_step_");
  check(arguments, checks);
  if (arguments.params.empty()) return;
  checks.bump_versions();  // now, while the tensors' records are still in the cache
  kRun(arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "complex_adam_step_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<complex_adam_step_<run_cpu>>(library, "complex_adam_step_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) {
  implement<complex_adam_step_<run_cuda>>(library, "complex_adam_step_");
}
#endif

}  // namespace nestopt::ops
