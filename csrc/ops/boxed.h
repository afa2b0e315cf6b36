// Kernels on the dispatcher's own stack.
//
// An unboxed kernel would take a copy of every tensor of every list, and give its arguments back one by one while the
// interpreter lock is released. Since a tensor that falls back to being held by Python alone takes that lock, a call
// with a thousand small tensors would spend a third of its time there. Here lists are read in place and dropped under
// one lock.
#pragma once

#include <Python.h>  // before the standard headers, as Python asks

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <vector>

namespace nestopt::ops {

using TensorRefs = std::vector<const at::Tensor*>;

// The arguments of one call, read in the order of the schema.
class BoxedArguments {
 public:
  BoxedArguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : next_(stack.data() + (stack.size() - op.schema().arguments().size())) {}

  TensorRefs tensors() {
    const c10::ArrayRef<c10::IValue> list = next_++->toListRef();
    TensorRefs refs;
    refs.reserve(list.size());
    for (const c10::IValue& value : list) refs.push_back(&value.toTensor());
    return refs;
  }
  const at::Tensor* tensor() { return &next_++->toTensor(); }
  const at::Tensor* optional_tensor() {  // null: None
    const c10::IValue& value = *next_++;
    return value.isNone() ? nullptr : &value.toTensor();
  }
  int64_t integer() { return next_++->toInt(); }
  double number() { return next_++->toDouble(); }
  bool flag() { return next_++->toBool(); }

 private:
  const c10::IValue* next_;
};

// The signature that torch::CppFunction::makeFromBoxedFunction asks for.
template <void (*kKernel)(BoxedArguments)>
void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  kKernel(BoxedArguments(op, *stack));
  const bool python = Py_IsInitialized() != 0;
  const PyGILState_STATE lock = python ? PyGILState_Ensure() : PyGILState_STATE{};
  torch::jit::drop(*stack, count);
  if (python) PyGILState_Release(lock);
}

// Registers a kernel that reads its arguments from the stack.
template <void (*kKernel)(BoxedArguments)>
void implement(torch::Library& library, const char* op) {
  library.impl(op, torch::CppFunction::makeFromBoxedFunction<&boxed<kKernel>>());
}

}  // namespace nestopt::ops
