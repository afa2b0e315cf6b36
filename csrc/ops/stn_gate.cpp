// stn_gate_ and stn_gate_backward_: checks, layout, dtypes, then the kernel of the device. Schemas and definitions:
// nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/stn_gate.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/rows.h"
#if defined(NESTOPT_WITH_CUDA)
#include <ATen/ops/empty.h>

#include "cuda/stn_gate.h"
#include "ops/cuda.h"
#endif

namespace nestopt::ops {
namespace {

// ---- checks ---------------------------------------------------------------------------------------------------------

struct Dims {
  int64_t batch;
  int64_t channel;
};

void check_dims(const ListCheck& checks, const at::Tensor& t, const char* name, const Dims& dims) {
  checks.shape(name, t, t.dim() >= 2, "have a dimension of examples and one of channels");
  checks.require("batch_dim", static_cast<double>(dims.batch), 0 <= dims.batch && dims.batch < t.dim(),
                 "be a dimension counted from 0");
  checks.require("channel_dim", static_cast<double>(dims.channel), dims.batch < dims.channel && dims.channel < t.dim(),
                 "be a dimension after batch_dim");
}

void check_gates(ListCheck& checks, const at::Tensor& gates, const char* other, const at::Tensor& t, const Dims& dims,
                 bool of_biases) {
  const int64_t examples = t.size(dims.batch), channels = t.size(dims.channel);
  checks.operand("gates", gates, other, t, coefficient_dtypes);
  checks.rank("gates", gates, 2, "examples and channels");
  checks.shape("gates", gates, gates.size(0) == examples, "have a row for each example, ", examples);
  if (of_biases) {
    checks.shape("gates", gates, gates.size(1) == 2 * channels, "have two columns for each channel, ", 2 * channels);
  } else {
    checks.shape("gates", gates, gates.size(1) == channels || gates.size(1) == 2 * channels,
                 "have a column or two for each channel, ", channels, " or ", 2 * channels);
  }
}

void check_bias(ListCheck& checks, const char* name, const at::Tensor* bias, const char* other, const at::Tensor& t,
                const Dims& dims) {
  if (bias == nullptr) return;
  checks.operand(name, *bias, other, t, coefficient_dtypes);
  checks.shape(name, *bias, bias->dim() == 1 && bias->size(0) == t.size(dims.channel),
               "have a number for each channel, ", t.size(dims.channel));
}

struct Forward {
  const at::Tensor* out;
  const at::Tensor* plain;
  const at::Tensor* response;
  const at::Tensor* gates;
  const at::Tensor* bias;
  const at::Tensor* response_bias;
  Dims dims;

  void check(ListCheck& checks) const {
    checks.leading("out", *out);
    check_dims(checks, *out, "out", dims);
    if (plain != nullptr) checks.following("plain", *plain, same_dtype, false);
    checks.following("response", *response, same_dtype, false);
    check_gates(checks, *gates, "out", *out, dims, response_bias != nullptr);
    check_bias(checks, "bias", bias, "out", *out, dims);
    check_bias(checks, "response_bias", response_bias, "out", *out, dims);
    checks.memory();
  }
};

struct Backward {
  const at::Tensor* sums;
  const at::Tensor* grads;
  const at::Tensor* shared;
  const at::Tensor* grad;
  const at::Tensor* response;
  const at::Tensor* gates;
  const at::Tensor* response_bias;
  Dims dims;

  bool stacked() const { return grads->size(dims.channel) != grad->size(dims.channel); }

  void check(ListCheck& checks) const {
    checks.leading("sums", *sums, kReal);
    checks.operand("grad", *grad, "sums", *sums, product_dtypes);
    check_dims(checks, *grad, "grad", dims);
    const int64_t examples = grad->size(dims.batch), channels = grad->size(dims.channel);
    checks.rank("sums", *sums, 2, "examples and channels");
    checks.shape("sums", *sums, sums->size(0) == examples && sums->size(1) == 2 * channels,
                 "have a row for each example and two columns for each channel, ", examples, " and ", 2 * channels);
    checks.operand("response", *response, "grad", *grad, same_dtype);
    checks.shape("response", *response, response->sizes() == grad->sizes(), "have the shape of grad");
    if (gates != nullptr) check_gates(checks, *gates, "grad", *grad, dims, response_bias != nullptr);
    check_bias(checks, "response_bias", response_bias, "grad", *grad, dims);
    if (grads != nullptr) {
      checks.operand("grads", *grads, "grad", *grad, same_dtype, true);
      std::vector<int64_t> wanted = grad->sizes().vec();
      const bool alike = grads->sizes() == grad->sizes();
      wanted[dims.channel] *= 2;
      checks.shape("grads", *grads, alike || grads->sizes() == at::IntArrayRef(wanted),
                   "have the shape of grad, or that with twice the channels");
      checks.shape("grads", *grads, gates != nullptr, "be None without gates");
    }
    if (shared != nullptr) {
      checks.operand("shared", *shared, "sums", *sums, same_dtype, true);
      checks.shape("shared", *shared, shared->sizes() == at::IntArrayRef({2, channels}),
                   "have two rows of a number for each channel, ", channels);
    }
    if (response_bias != nullptr) {
      checks.shape("response_bias", *response_bias, gates != nullptr && shared != nullptr,
                   "be None without gates and shared");
    }
    checks.memory();
  }
};

// ---- layout ---------------------------------------------------------------------------------------------------------

// The one stride of dimensions [first, last), if they can be walked as one; false if not.
bool one_stride(const at::Tensor& t, int64_t first, int64_t last, int64_t& stride) {
  int64_t next = -1;  // what the stride of the dimension outside of those met so far must be
  stride = 0;
  for (int64_t d = last - 1; d >= first; --d) {
    if (t.size(d) == 1) continue;
    if (next < 0) {
      stride = t.stride(d);
    } else if (t.stride(d) != next) {
      return false;
    }
    next = t.stride(d) * t.size(d);
  }
  return true;
}

int64_t extent(const at::Tensor& t, int64_t first, int64_t last) {
  int64_t product = 1;
  for (int64_t d = first; d < last; ++d) product *= t.size(d);
  return product;
}

// How a call walks its tensors: with their channels moved inside, or as they are.
class Walk {
 public:
  // `lead` decides; it is not empty. Others are copied where they do not fit.
  Walk(const at::Tensor& lead, const Dims& dims) : dims_(dims), given_channel_(dims.channel) {
    StnGateSlabs unused;
    if (dims.channel + 1 < lead.dim() && !fits(lead, unused)) {
      dims_.channel = lead.dim() - 1;
      moved_ = fits(lead.movedim(given_channel_, -1), unused);
      if (!moved_) dims_.channel = given_channel_;
    }
    const at::Tensor t = view(lead);
    sizes_ = {.outer = extent(t, 0, dims_.batch),
              .examples = t.size(dims_.batch),
              .middle = extent(t, dims_.batch + 1, dims_.channel),
              .channels = t.size(dims_.channel),
              .run = extent(t, dims_.channel + 1, t.dim())};
  }

  const StnGateSizes& sizes() const { return sizes_; }

  // The slabs of a tensor that is read, of itself or of a copy that is kept.
  StnGateSlabs read(const at::Tensor* t) {
    StnGateSlabs slabs;
    if (t == nullptr) return slabs;
    at::Tensor viewed = view(*t);
    if (!fits(viewed, slabs)) {
      viewed = kept_.emplace_back(viewed.contiguous());
      fits(viewed, slabs);
    }
    slabs.data = viewed.const_data_ptr();
    return slabs;
  }

  // The slabs of a tensor that is written, of itself or of one whose contents finish() brings there.
  StnGateSlabs write(const at::Tensor& t) {
    StnGateSlabs slabs;
    at::Tensor viewed = view(t);
    if (!fits(viewed, slabs)) {
      at::Tensor instead = viewed.new_empty(viewed.sizes());
      fits(instead, slabs);
      written_.emplace_back(viewed, instead);
      viewed = instead;
    }
    slabs.data = viewed.mutable_data_ptr();
    return slabs;
  }

  void finish() {
    for (auto& [to, from] : written_) to.copy_(from);
  }

 private:
  Dims dims_;
  int64_t given_channel_;
  bool moved_ = false;
  StnGateSizes sizes_;
  std::vector<at::Tensor> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;

  at::Tensor view(const at::Tensor& t) const { return moved_ ? t.movedim(given_channel_, -1) : t; }

  // Whether what belongs to one slab lies next to each other, and slabs lie at one stride in each direction.
  bool fits(const at::Tensor& t, StnGateSlabs& slabs) const {
    int64_t run_stride;
    const int64_t run = extent(t, dims_.channel + 1, t.dim());
    slabs.example_stride = t.stride(dims_.batch);
    return one_stride(t, dims_.channel + 1, t.dim(), run_stride) && (run == 1 || run_stride == 1) &&
           (t.size(dims_.channel) == 1 || t.stride(dims_.channel) == run) &&
           one_stride(t, 0, dims_.batch, slabs.outer_stride) &&
           one_stride(t, dims_.batch + 1, dims_.channel, slabs.middle_stride);
  }
};

// A tensor that is written, or one of its size instead.
at::Tensor dense(const at::Tensor& t) { return t.is_contiguous() ? t : t.new_empty(t.sizes()); }

// Numbers for the channels in the type of the arithmetic, next to each other; null stays null.
const void* coefficients(const at::Tensor* t, at::ScalarType data, at::Tensor& kept) {
  if (t == nullptr) return nullptr;
  kept = t->to(opmath_dtype(data).front()).contiguous();
  return kept.const_data_ptr();
}

// ---- dtypes and devices ---------------------------------------------------------------------------------------------

// Calls visit(X{}, G{}) with the types of the data and of the gates.
template <class Visit>
void visit_dtypes(const at::Tensor& data, const at::Tensor& gates, Visit visit) {
  const bool wide = gates.scalar_type() == at::kFloat;
  switch (data.scalar_type()) {
    case at::kDouble:
      return visit(double{}, double{});
    case at::kBFloat16:
      return wide ? visit(BFloat16{}, float{}) : visit(BFloat16{}, BFloat16{});
    case at::kHalf:
      return wide ? visit(Float16{}, float{}) : visit(Float16{}, Float16{});
    default:
      return visit(float{}, float{});
  }
}

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

struct OnCpu {
  static void run(const at::Tensor& data, const at::Tensor& gates, const StnGate& gate) {
    const int64_t unit = cpu::StnGateBlocks(gate.sizes).channels * gate.sizes.run;
    visit_dtypes(data, gates, [&](auto x, auto g) {
      at::parallel_for(
          0, cpu::stn_gate_count(gate), std::max<int64_t>(1, kGrain / unit),
          [&](int64_t first, int64_t last) { cpu::stn_gate_units<decltype(x), decltype(g)>(gate, first, last); });
    });
  }

  static void run(const at::Tensor& data, const at::Tensor& gates, StnGateBackward& backward) {
    const int64_t pieces = backward.pieces();
    std::vector<double> partials(pieces > 1 ? pieces * backward.num_sums() : 0);
    if (pieces > 1) backward.partials = partials.data();
    const int64_t unit = cpu::StnGateBlocks(backward.sizes).channels * backward.sizes.run *
                         std::min(backward.sizes.positions(), StnGateBackward::kPiece);
    visit_dtypes(data, gates, [&](auto x, auto g) {
      using X = decltype(x);
      at::parallel_for(
          0, cpu::stn_gate_backward_count(backward), std::max<int64_t>(1, kGrain / unit),
          [&](int64_t first, int64_t last) { cpu::stn_gate_backward_units<X, decltype(g)>(backward, first, last); });
      for (int64_t i = 0; pieces > 1 && i < backward.num_sums(); ++i) backward.add_partials<math_t<X>>(i);
      if (backward.shared == nullptr) return;
      const int64_t fold = std::max<int64_t>(1, kGrain / (cpu::kStnGateFold * backward.sizes.examples));
      at::parallel_for(0, cpu::stn_gate_fold_count(backward), fold, [&](int64_t first, int64_t last) {
        cpu::stn_gate_fold_units<X, decltype(g)>(backward, first, last);
      });
    });
  }
};

#if defined(NESTOPT_WITH_CUDA)
struct OnCuda {
  static void run(const at::Tensor& data, const at::Tensor& gates, const StnGate& gate) {
    const CurrentDevice on(data);
    visit_dtypes(data, gates, [&](auto x, auto g) {
      C10_CUDA_CHECK((cuda::stn_gate<decltype(x), decltype(g)>(gate, on.stream())));
    });
  }

  static void run(const at::Tensor& data, const at::Tensor& gates, StnGateBackward& backward) {
    const CurrentDevice on(data);
    at::Tensor partials;
    if (backward.pieces() > 1) {
      partials = at::empty({backward.pieces() * backward.num_sums()}, data.options().dtype(at::kDouble));
      backward.partials = partials.mutable_data_ptr<double>();
    }
    visit_dtypes(data, gates, [&](auto x, auto g) {
      C10_CUDA_CHECK((cuda::stn_gate_backward<decltype(x), decltype(g)>(backward, on.stream())));
    });
  }
};
#endif

// ---- the ops --------------------------------------------------------------------------------------------------------

Dims read_dims(BoxedArguments& next) {
  const int64_t batch = next.integer();
  return {batch, next.integer()};
}

template <class Device>
void stn_gate_(BoxedArguments next) {
  Forward a{.out = next.tensor(),
            .plain = next.optional_tensor(),
            .response = next.tensor(),
            .gates = next.tensor(),
            .bias = next.optional_tensor(),
            .response_bias = next.optional_tensor(),
            .dims = {}};
  a.dims = read_dims(next);
  ListCheck checks("stn_gate_");
  a.check(checks);
  checks.bump_versions();
  if (a.out->numel() == 0) return;
  const at::AutoDispatchBelowADInplaceOrView copies_are_ours;
  Walk walk(*a.response, a.dims);
  const at::Tensor gates = with_dense_rows(*a.gates);
  at::Tensor bias, response_bias;
  Device::run(*a.response, gates,
              StnGate{.sizes = walk.sizes(),
                      .out = walk.write(*a.out),
                      .plain = walk.read(a.plain),
                      .response = walk.read(a.response),
                      .gates = {gates.const_data_ptr(), gates.stride(0)},
                      .bias = coefficients(a.bias, a.out->scalar_type(), bias),
                      .response_bias = coefficients(a.response_bias, a.out->scalar_type(), response_bias)});
  walk.finish();
}

template <class Device>
void stn_gate_backward_(BoxedArguments next) {
  Backward a{.sums = next.tensor(),
             .grads = next.optional_tensor(),
             .shared = next.optional_tensor(),
             .grad = next.tensor(),
             .response = next.tensor(),
             .gates = next.optional_tensor(),
             .response_bias = next.optional_tensor(),
             .dims = {}};
  a.dims = read_dims(next);
  ListCheck checks("stn_gate_backward_");
  a.check(checks);
  checks.bump_versions();
  const at::AutoDispatchBelowADInplaceOrView copies_are_ours;
  if (a.grad->numel() == 0) {
    a.sums->zero_();
    if (a.shared != nullptr) a.shared->zero_();
    return;
  }
  Walk walk(*a.response, a.dims);
  const at::Tensor gates = a.gates == nullptr ? *a.sums : with_dense_rows(*a.gates);
  const at::Tensor sums = dense(*a.sums);
  const at::Tensor shared = a.shared == nullptr ? at::Tensor() : dense(*a.shared);
  at::Tensor response_bias;
  StnGateBackward backward{.sizes = walk.sizes(),
                           .copied = {},
                           .scaled = {},
                           .grad = walk.read(a.grad),
                           .response = walk.read(a.response),
                           .gates = {a.gates == nullptr ? nullptr : gates.const_data_ptr(), gates.stride(0)},
                           .sums = sums.mutable_data_ptr(),
                           .partials = nullptr,
                           .shared = a.shared == nullptr ? nullptr : shared.mutable_data_ptr(),
                           .response_bias = coefficients(a.response_bias, a.grad->scalar_type(), response_bias)};
  if (a.grads != nullptr && a.stacked()) {
    const int64_t channels = a.grad->size(a.dims.channel);
    backward.copied = walk.write(a.grads->narrow(a.dims.channel, 0, channels));
    backward.scaled = walk.write(a.grads->narrow(a.dims.channel, channels, channels));
  } else if (a.grads != nullptr) {
    backward.scaled = walk.write(*a.grads);
  }
  Device::run(*a.response, gates, backward);
  walk.finish();
  if (!sums.is_same(*a.sums)) a.sums->copy_(sums);
  if (a.shared != nullptr && !shared.is_same(*a.shared)) a.shared->copy_(shared);
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) {
  implement_no_derivative(library, "stn_gate_");
  implement_no_derivative(library, "stn_gate_backward_");
}
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) {
  implement<stn_gate_<OnCpu>>(library, "stn_gate_");
  implement<stn_gate_backward_<OnCpu>>(library, "stn_gate_backward_");
}
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) {
  implement<stn_gate_<OnCuda>>(library, "stn_gate_");
  implement<stn_gate_backward_<OnCuda>>(library, "stn_gate_backward_");
}
#endif

}  // namespace nestopt::ops
