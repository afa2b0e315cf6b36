// What an op without derivatives does when autograd asks for one.
#pragma once

#include "ops/boxed.h"

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <string>

namespace nestopt::ops {

inline bool has_derivative(const at::Tensor& t) { return t.requires_grad() || t._fw_grad(/*level=*/0).defined(); }

[[noreturn]] inline void refuse_derivative(const c10::OperatorHandle& op, const std::string& label,
                                           const at::Tensor& t) {
  const std::string qualified = op.schema().name();
  const std::string name = qualified.substr(qualified.rfind(':') + 1);
  TORCH_CHECK_VALUE(!t.requires_grad(), name, ": ", label,
                    " must not require grad while grad mode is on; got one that does. Call under torch.no_grad().");
  TORCH_CHECK_VALUE(false, name, ": ", label, " must not carry a forward-mode tangent; got one that does. Detach it.");
}

// The kernel for the Autograd key. Passing on would drop the graph, or leave a tangent as it was, without a word.
inline void refuse_derivatives(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (c10::GradMode::is_enabled()) {
    const auto& arguments = op.schema().arguments();
    const auto values = torch::jit::last(*stack, arguments.size());
    for (size_t a = 0; a < arguments.size(); ++a) {
      if (values[a].isTensor()) {
        const at::Tensor& t = values[a].toTensor();
        if (has_derivative(t)) refuse_derivative(op, arguments[a].name(), t);
      } else if (values[a].isTensorList()) {
        const auto list = values[a].toListRef();
        for (size_t i = 0; i < list.size(); ++i) {
          const at::Tensor& t = list[i].toTensor();
          if (has_derivative(t)) refuse_derivative(op, arguments[a].name() + "[" + std::to_string(i) + "]", t);
        }
      }
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

inline void implement_no_derivative(torch::Library& library, const char* op) {
  library.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives>());
}

}  // namespace nestopt::ops
