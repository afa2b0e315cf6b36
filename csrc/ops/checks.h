// What an op requires of its arguments before it touches memory. nestopt_ext/_checks.py is the Python mirror, with the
// same messages: `<op>: <argument[index]> must <rule>; got <value>. <remedy>`.
#pragma once

#include "ops/boxed.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/StringUtil.h>

#include <string>
#include <vector>

namespace nestopt::ops {

inline constexpr at::ScalarType kFloating[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
inline constexpr at::ScalarType kReal[] = {at::kFloat, at::kDouble};

// The dtypes allowed beside a tensor of the leading list.
using DtypeRule = c10::ArrayRef<at::ScalarType> (*)(at::ScalarType leading);
c10::ArrayRef<at::ScalarType> same_dtype(at::ScalarType leading);
c10::ArrayRef<at::ScalarType> opmath_dtype(at::ScalarType leading);        // float32 beside 16-bit types
c10::ArrayRef<at::ScalarType> product_dtypes(at::ScalarType leading);      // the same, or 16 bits beside float32
c10::ArrayRef<at::ScalarType> factor_dtypes(at::ScalarType leading);       // those, or any beside float64
c10::ArrayRef<at::ScalarType> coefficient_dtypes(at::ScalarType leading);  // the same, or float32 beside 16 bits

// Checks one call of one op: lists of tensors, or single ones, against a leading one, then memory across all of them.
// Each member throws on the first fault; nothing is modified before the last one has returned. Names, lists and tensors
// must outlive the checks.
class ListCheck {
 public:
  explicit ListCheck(const char* op) : op_(op) {}

  void finite(const char* name, double value) const;
  void require(const char* name, double value, bool holds, const char* rule, const char* remedy = "") const;

  // The list, or the one tensor, that fixes count, shapes and device; it is written to.
  void leading(const char* name, const TensorRefs& tensors) { lead({name, &tensors, nullptr, true}, kFloating); }
  void leading(const char* name, const at::Tensor& t, c10::ArrayRef<at::ScalarType> dtypes = kFloating) {
    lead({name, nullptr, &t, true}, dtypes);
  }

  // What follows the leading list or tensor.
  void following(const char* name, const TensorRefs& tensors, DtypeRule rule, bool written) {
    follow({name, &tensors, nullptr, written}, rule);
  }
  void following(const char* name, const at::Tensor& t, DtypeRule rule, bool written) {
    follow({name, nullptr, &t, written}, rule);
  }

  // A tensor has this number of dimensions, which mean something.
  void rank(const char* name, const at::Tensor& t, int64_t dims, const char* meaning) const;

  // A written tensor of one dimension, not empty, beside the leading tensor and of its dtype.
  void vector(const char* name, const at::Tensor& t, const char* meaning);

  // The shape of a tensor obeys a rule of the op's own, whose parts make up the text.
  template <class... Rule>
  void shape(const char* name, const at::Tensor& t, bool holds, const Rule&... rule) const {
    if (!holds) refuse_shape(name, t, c10::str(rule...));
  }

  // A tensor of a shape of its own beside another one, whose dtype tells those allowed here.
  void operand(const char* name, const at::Tensor& t, const char* other, const at::Tensor& lead, DtypeRule rule,
               bool written = false);

  // A number, float32 or float64, for each row of the leading tensor; only read.
  void row_numbers(const char* name, const at::Tensor& t);

  // Numbers, float32 or float64, beside the leading tensor and of another shape, which means something; only read.
  void shaped(const char* name, const at::Tensor& t, at::IntArrayRef shape, const std::string& meaning);

  // A list that may be left out only while `needed` is false.
  void following_or_empty(const char* name, const TensorRefs& tensors, DtypeRule rule, bool needed,
                          const char* needed_while);

  // A list of one number, float32 or float64, beside each tensor of the leading list; it is written to.
  void scalars(const char* name, const TensorRefs& tensors);

  // A tensor of one element, float32 or float64, on the CPU (if on_cpu) or beside the leading list. Null passes: None.
  void scalar(const char* name, const at::Tensor* t, bool written, bool on_cpu);

  // Storage is large enough, and nothing that is written shares memory with anything else.
  void memory() const;

  // Tells autograd that the written tensors changed.
  void bump_versions() const;

 private:
  struct Argument {
    const char* name;
    const TensorRefs* list;  // null: one tensor
    const at::Tensor* single;
    bool written;

    int64_t size() const { return list != nullptr ? static_cast<int64_t>(list->size()) : 1; }
    const at::Tensor& operator[](int64_t i) const { return list != nullptr ? *(*list)[i] : *single; }
    std::string label(int64_t i) const {
      return list != nullptr ? std::string(name) + "[" + std::to_string(i) + "]" : name;
    }
  };
  struct Span;  // the memory of one tensor

  [[noreturn]] void refuse_shape(const char* name, const at::Tensor& t, const std::string& rule) const;
  void lead(const Argument& argument, c10::ArrayRef<at::ScalarType> dtypes);
  void follow(const Argument& argument, DtypeRule rule);
  void count(const Argument& argument) const;
  void strided(const Argument& argument, int64_t i) const;
  void real(const Argument& argument, int64_t i) const;
  void number(const Argument& argument, int64_t i) const;
  void beside(const Argument& argument, int64_t i) const;
  void may_write(const Argument& argument, int64_t i) const;
  void addresses(size_t count) const;
  void no_sharing(std::vector<Span> cluster) const;

  const char* op_;
  Argument leader_{};
  std::vector<Argument> arguments_;
};

// The value of a one-element float32 or float64 tensor on the CPU.
double cpu_value(const at::Tensor& t);

}  // namespace nestopt::ops
