#include "ops/checks.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>

namespace nestopt::ops {
namespace {

bool contains(c10::ArrayRef<at::ScalarType> dtypes, at::ScalarType dtype) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

std::string either(c10::ArrayRef<at::ScalarType> dtypes) {
  std::string text = name_of(dtypes.front());
  for (size_t i = 1; i < dtypes.size(); ++i) text += (i + 1 < dtypes.size() ? ", " : " or ") + name_of(dtypes[i]);
  return text;
}

std::string tuple_of(at::IntArrayRef values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + (values.size() == 1 ? ",)" : ")");
}

std::string name_of(at::Layout layout) {
  std::ostringstream text;
  text << layout;
  std::string name = text.str();  // "SparseCsr"
  std::string snake;
  for (char c : name) {
    if (std::isupper(static_cast<unsigned char>(c)) && !snake.empty()) snake += '_';
    snake += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return snake == "sparse" ? "sparse_coo" : snake;
}

// True unless each stride steps over all the memory that the smaller strides reach.
bool overlaps_itself(const at::Tensor& t) {
  if (t.is_non_overlapping_and_dense() || t.numel() < 2) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// Bytes from the first to one past the last element.
int64_t extent(const at::Tensor& t) {
  if (t.is_non_overlapping_and_dense()) return t.numel() * static_cast<int64_t>(t.itemsize());
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * static_cast<int64_t>(t.itemsize());
}

template <class Body>
void for_each_offset(const at::Tensor& t, Body body) {  // bytes from the first element
  const int64_t item = static_cast<int64_t>(t.itemsize());
  std::vector<int64_t> index(t.dim(), 0);
  int64_t offset = 0;
  for (int64_t left = t.numel(); left > 0; --left) {
    body(offset * item);
    for (int64_t d = t.dim() - 1; d >= 0; --d) {
      offset += t.stride(d);
      if (++index[d] < t.size(d)) break;
      offset -= t.stride(d) * t.size(d);
      index[d] = 0;
    }
  }
}

}  // namespace

struct ListCheck::Span {
  uintptr_t begin;
  uintptr_t end;
  uint32_t argument;
  uint32_t index;
};

namespace {

// The storages met so far. Tensors that each have a storage of their own, from the allocator, share no memory and are
// aligned, and nothing need be known of their addresses; that is quicker than sorting those of a thousand small
// tensors.
class StorageSet {
 public:
  explicit StorageSet(size_t count) : slots_(std::bit_ceil(2 * count + 1), nullptr) {}

  // False where the memory may belong to something else as well: NumPy, another process, a lazy copy.
  bool owns_its_memory(const c10::StorageImpl& storage) {
    const c10::Allocator* allocator = const_cast<c10::StorageImpl&>(storage).allocator();
    if (allocator == nullptr) return false;
    if (allocator != allocator_) {
      allocator_ = allocator;
      deleter_ = allocator->raw_deleter();
    }
    return deleter_ != nullptr && storage.data_ptr().get_deleter() == deleter_;
  }

  // False if it is there already.
  bool insert(const c10::StorageImpl* storage) {
    const size_t mask = slots_.size() - 1;
    for (size_t at = (reinterpret_cast<uintptr_t>(storage) >> 4) * 0x9E3779B97F4A7C15u >> 20;; ++at) {
      const c10::StorageImpl*& slot = slots_[at & mask];
      if (slot == storage) return false;
      if (slot == nullptr) {
        slot = storage;
        return true;
      }
    }
  }

 private:
  std::vector<const c10::StorageImpl*> slots_;
  const c10::Allocator* allocator_ = nullptr;
  c10::DeleterFnPtr deleter_ = nullptr;
};

}  // namespace

c10::ArrayRef<at::ScalarType> same_dtype(at::ScalarType leading) {
  return *std::find(std::begin(kFloating), std::end(kFloating), leading);
}

c10::ArrayRef<at::ScalarType> opmath_dtype(at::ScalarType leading) { return kReal[leading == at::kDouble ? 1 : 0]; }

c10::ArrayRef<at::ScalarType> product_dtypes(at::ScalarType leading) {
  static constexpr at::ScalarType kBesideFloat[] = {at::kFloat, at::kBFloat16, at::kHalf};
  return leading == at::kFloat ? c10::ArrayRef<at::ScalarType>(kBesideFloat) : same_dtype(leading);
}

c10::ArrayRef<at::ScalarType> factor_dtypes(at::ScalarType leading) {
  return leading == at::kDouble ? c10::ArrayRef<at::ScalarType>(kFloating) : product_dtypes(leading);
}

c10::ArrayRef<at::ScalarType> coefficient_dtypes(at::ScalarType leading) {
  static constexpr at::ScalarType kBesideBfloat16[] = {at::kBFloat16, at::kFloat};
  static constexpr at::ScalarType kBesideHalf[] = {at::kHalf, at::kFloat};
  if (leading == at::kBFloat16) return kBesideBfloat16;
  return leading == at::kHalf ? c10::ArrayRef<at::ScalarType>(kBesideHalf) : same_dtype(leading);
}

double cpu_value(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : *t.const_data_ptr<float>();
}

void ListCheck::finite(const char* name, double value) const {
  // A NaN may print with a sign.
  TORCH_CHECK_VALUE(!std::isnan(value), op_, ": ", name, " must be finite; got nan.");
  TORCH_CHECK_VALUE(std::isfinite(value), op_, ": ", name, " must be finite; got ", value, ".");
}

void ListCheck::require(const char* name, double value, bool holds, const char* rule, const char* remedy) const {
  TORCH_CHECK_VALUE(holds, op_, ": ", name, " must ", rule, "; got ", value, ".", *remedy ? " " : "", remedy);
}

void ListCheck::count(const Argument& argument) const {
  TORCH_CHECK_VALUE(argument.size() == leader_.size(), op_, ": ", argument.name, " must have the length of ",
                    leader_.name, ", ", leader_.size(), "; got ", argument.size(), ".");
}

void ListCheck::strided(const Argument& argument, int64_t i) const {
  const at::Tensor& t = argument[i];
  TORCH_CHECK_TYPE(t.defined(), op_, ": ", argument.label(i), " must be a tensor; got None.");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, op_, ": ", argument.label(i), " must be a strided (dense) tensor; got ",
                   name_of(t.layout()), ". Call .to_dense() on it.");
}

void ListCheck::real(const Argument& argument, int64_t i) const {
  strided(argument, i);
  TORCH_CHECK_TYPE(contains(kReal, argument[i].scalar_type()), op_, ": ", argument.label(i), " must be ", either(kReal),
                   "; got ", name_of(argument[i].scalar_type()), ".");
}

void ListCheck::number(const Argument& argument, int64_t i) const {
  const at::Tensor& t = argument[i];
  real(argument, i);
  TORCH_CHECK_VALUE(t.numel() == 1, op_, ": ", argument.label(i), " must have one element; got shape ",
                    tuple_of(t.sizes()), ".");
}

void ListCheck::beside(const Argument& argument, int64_t i) const {
  TORCH_CHECK_VALUE(argument[i].device() == leader_[i].device(), op_, ": ", argument.label(i), " must be on ",
                    leader_[i].device(), ", the device of ", leader_.label(i), "; got ", argument[i].device(), ".");
}

void ListCheck::may_write(const Argument& argument, int64_t i) const {
  const at::Tensor& t = argument[i];
  TORCH_CHECK_VALUE(!(c10::GradMode::is_enabled() && t.requires_grad()), op_, ": ", argument.label(i),
                    " must not require grad while grad mode is on; got one that does. Call under torch.no_grad().");
  TORCH_CHECK_VALUE(!overlaps_itself(t), op_, ": ", argument.label(i), " must not overlap itself; got shape ",
                    tuple_of(t.sizes()), " with strides ", tuple_of(t.strides()), ". Pass a clone.");
  TORCH_CHECK_VALUE(!t.is_inference() || c10::InferenceMode::is_enabled(), op_, ": ", argument.label(i),
                    " must not be an inference tensor outside inference mode; got one. Pass a clone.");
}

void ListCheck::lead(const Argument& argument, c10::ArrayRef<at::ScalarType> dtypes) {
  leader_ = argument;
  for (int64_t i = 0; i < leader_.size(); ++i) {
    const at::Tensor& t = leader_[i];
    strided(leader_, i);
    TORCH_CHECK_TYPE(contains(dtypes, t.scalar_type()), op_, ": ", leader_.label(i), " must be ", either(dtypes),
                     "; got ", name_of(t.scalar_type()), ".");
    TORCH_CHECK_VALUE(t.device() == leader_[0].device(), op_, ": ", leader_.label(i), " must be on ",
                      leader_[0].device(), ", the device of ", leader_.label(0), "; got ", t.device(),
                      ". Call once per device.");
    may_write(leader_, i);
  }
  arguments_.push_back(leader_);
}

void ListCheck::follow(const Argument& argument, DtypeRule rule) {
  count(argument);
  at::ScalarType ruled = at::ScalarType::Undefined;
  c10::ArrayRef<at::ScalarType> allowed;
  for (int64_t i = 0; i < argument.size(); ++i) {
    const at::Tensor& t = argument[i];
    const at::Tensor& lead = leader_[i];
    if (lead.scalar_type() != ruled) {
      ruled = lead.scalar_type();
      allowed = rule(ruled);
    }
    strided(argument, i);
    beside(argument, i);
    TORCH_CHECK_TYPE(contains(allowed, t.scalar_type()), op_, ": ", argument.label(i), " must be ", either(allowed),
                     " beside ", leader_.label(i), " of ", name_of(ruled), "; got ", name_of(t.scalar_type()), ".");
    TORCH_CHECK_VALUE(t.sizes() == lead.sizes(), op_, ": ", argument.label(i), " must have the shape of ",
                      leader_.label(i), " ", tuple_of(lead.sizes()), "; got ", tuple_of(t.sizes()), ".");
    if (argument.written) may_write(argument, i);
  }
  arguments_.push_back(argument);
}

void ListCheck::rank(const char* name, const at::Tensor& t, int64_t dims, const char* meaning) const {
  strided({name, nullptr, &t, false}, 0);
  TORCH_CHECK_VALUE(t.dim() == dims, op_, ": ", name, " must have ", dims, dims == 1 ? " dimension, " : " dimensions, ",
                    meaning, "; got shape ", tuple_of(t.sizes()), ".");
}

void ListCheck::vector(const char* name, const at::Tensor& t, const char* meaning) {
  const Argument argument{name, nullptr, &t, true};
  strided(argument, 0);
  beside(argument, 0);
  const std::string wanted = name_of(leader_[0].scalar_type());
  TORCH_CHECK_TYPE(t.scalar_type() == leader_[0].scalar_type(), op_, ": ", name, " must be ", wanted, " beside ",
                   leader_.name, " of ", wanted, "; got ", name_of(t.scalar_type()), ".");
  TORCH_CHECK_VALUE(t.dim() == 1 && t.numel() > 0, op_, ": ", name,
                    " must have one dimension and an element at least, ", meaning, "; got shape ", tuple_of(t.sizes()),
                    ".");
  may_write(argument, 0);
  arguments_.push_back(argument);
}

void ListCheck::refuse_shape(const char* name, const at::Tensor& t, const std::string& rule) const {
  TORCH_CHECK_VALUE(false, op_, ": ", name, " must ", rule, "; got shape ", tuple_of(t.sizes()), ".");
}

void ListCheck::operand(const char* name, const at::Tensor& t, const char* other, const at::Tensor& lead,
                        DtypeRule rule, bool written) {
  const Argument argument{name, nullptr, &t, written};
  strided(argument, 0);
  TORCH_CHECK_VALUE(t.device() == lead.device(), op_, ": ", name, " must be on ", lead.device(), ", the device of ",
                    other, "; got ", t.device(), ".");
  const c10::ArrayRef<at::ScalarType> allowed = rule(lead.scalar_type());
  TORCH_CHECK_TYPE(contains(allowed, t.scalar_type()), op_, ": ", name, " must be ", either(allowed), " beside ", other,
                   " of ", name_of(lead.scalar_type()), "; got ", name_of(t.scalar_type()), ".");
  if (written) may_write(argument, 0);
  arguments_.push_back(argument);
}

void ListCheck::row_numbers(const char* name, const at::Tensor& t) {
  shaped(name, t, leader_[0].sizes().slice(0, 1), std::string("a number for each row of ") + leader_.name);
}

void ListCheck::shaped(const char* name, const at::Tensor& t, at::IntArrayRef shape, const std::string& meaning) {
  const Argument argument{name, nullptr, &t, false};
  real(argument, 0);
  beside(argument, 0);
  TORCH_CHECK_VALUE(t.sizes() == shape, op_, ": ", name, " must have ", meaning, ", shape ", tuple_of(shape), "; got ",
                    tuple_of(t.sizes()), ".");
  arguments_.push_back(argument);
}

void ListCheck::following_or_empty(const char* name, const TensorRefs& tensors, DtypeRule rule, bool needed,
                                   const char* needed_while) {
  TORCH_CHECK_VALUE(!tensors.empty() || !needed || leader_.size() == 0, op_, ": ", name, " must have the length of ",
                    leader_.name, ", ", leader_.size(), ", while ", needed_while, "; got 0.");
  if (!tensors.empty()) following(name, tensors, rule, true);
}

void ListCheck::scalars(const char* name, const TensorRefs& tensors) {
  const Argument argument{name, &tensors, nullptr, true};
  count(argument);
  for (int64_t i = 0; i < argument.size(); ++i) {
    number(argument, i);
    beside(argument, i);
    may_write(argument, i);
  }
  arguments_.push_back(argument);
}

void ListCheck::scalar(const char* name, const at::Tensor* tensor, bool written, bool on_cpu) {
  if (tensor == nullptr) return;
  const at::Tensor& t = *tensor;
  const Argument argument{name, nullptr, tensor, written};
  number(argument, 0);
  const at::Device device = leader_.size() == 0 ? t.device() : leader_[0].device();
  TORCH_CHECK_VALUE(t.device() == device || (on_cpu && t.is_cpu()), op_, ": ", name, " must be on ",
                    on_cpu && !device.is_cpu() ? "cpu or " : "", device, "; got ", t.device(), ".");
  if (written) may_write(argument, 0);
  arguments_.push_back(argument);
}

void ListCheck::memory() const {
  size_t count = 0;
  for (const Argument& argument : arguments_) count += argument.size();
  StorageSet storages(count);
  bool apart = true;
  for (const Argument& argument : arguments_) {
    for (int64_t i = 0; i < argument.size(); ++i) {
      const at::Tensor& t = argument[i];
      if (t.numel() == 0) continue;
      const int64_t bytes = t.storage_offset() * static_cast<int64_t>(t.itemsize()) + extent(t);
      const c10::StorageImpl* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
      const int64_t held = storage != nullptr ? static_cast<int64_t>(storage->nbytes()) : 0;
      TORCH_CHECK_VALUE(bytes <= held, op_, ": ", argument.label(i),
                        " must have storage for its elements; got a storage of ", held,
                        " bytes. It was resized or freed behind the tensor.");
      apart = apart && storages.owns_its_memory(*storage) && storages.insert(storage);
    }
  }
  if (!apart) addresses(count);
}

void ListCheck::addresses(size_t count) const {
  std::vector<Span> spans;
  spans.reserve(count);
  for (size_t a = 0; a < arguments_.size(); ++a) {
    const Argument& argument = arguments_[a];
    for (int64_t i = 0; i < argument.size(); ++i) {
      const at::Tensor& t = argument[i];
      if (t.numel() == 0) continue;
      // Asking for a mutable address first gives a copy-on-write tensor memory of its own.
      const void* address = argument.written ? t.mutable_data_ptr() : t.const_data_ptr();
      const auto begin = reinterpret_cast<uintptr_t>(address);
      TORCH_CHECK_VALUE(begin % t.itemsize() == 0, op_, ": ", argument.label(i),
                        " must be aligned to its element size, ", t.itemsize(), " bytes; got an address that is ",
                        begin % t.itemsize(), " past it. Pass a clone.");
      spans.push_back({begin, begin + extent(t), static_cast<uint32_t>(a), static_cast<uint32_t>(i)});
    }
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t first = 0; first < spans.size();) {
    size_t last = first + 1;
    uintptr_t end = spans[first].end;
    for (; last < spans.size() && spans[last].begin < end; ++last) end = std::max(end, spans[last].end);
    if (last - first > 1) no_sharing({spans.begin() + first, spans.begin() + last});
    first = last;
  }
}

// Exact test on tensors whose address ranges overlap: notes the owner of every element that is written, then looks for
// others there. Only interleaved views come this far, and wrong arguments.
void ListCheck::no_sharing(std::vector<Span> cluster) const {
  const auto written = [&](const Span& span) { return arguments_[span.argument].written; };
  const auto tensor = [&](const Span& span) -> const at::Tensor& { return arguments_[span.argument][span.index]; };
  const auto label = [&](const Span& span) { return arguments_[span.argument].label(span.index); };
  const uintptr_t start = cluster.front().begin;
  std::sort(cluster.begin(), cluster.end(), [&](const Span& a, const Span& b) {
    return std::tuple(!written(a), a.argument, a.index) < std::tuple(!written(b), b.argument, b.index);
  });
  if (!written(cluster.front())) return;
  // Every address is a multiple of its element size, so all are multiples of the smallest one.
  int64_t cell = 8;
  uintptr_t end = 0;
  for (const Span& span : cluster) {
    cell = std::min(cell, static_cast<int64_t>(tensor(span).itemsize()));
    end = std::max(end, span.end);
  }
  std::vector<uint32_t> owners((end - start) / cell, 0);
  for (size_t i = 0; i < cluster.size(); ++i) {
    const Span& span = cluster[i];
    const auto base = static_cast<int64_t>(span.begin - start);
    const int64_t cells = static_cast<int64_t>(tensor(span).itemsize()) / cell;
    uint32_t owner = 0;
    for_each_offset(tensor(span), [&](int64_t offset) {
      for (int64_t c = 0; c < cells; ++c) {
        uint32_t& mark = owners[(base + offset) / cell + c];
        owner = std::max(owner, mark);
        if (written(span)) mark = static_cast<uint32_t>(i + 1);
      }
    });
    TORCH_CHECK_VALUE(owner == 0, op_, ": ", label(cluster[owner == 0 ? 0 : owner - 1]), " must not share memory with ",
                      label(span), "; got overlapping tensors. Pass a clone.");
  }
}

void ListCheck::bump_versions() const {
  for (const Argument& argument : arguments_) {
    if (!argument.written) continue;
    for (int64_t i = 0; i < argument.size(); ++i) {
      if (!argument[i].is_inference()) argument[i].unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace nestopt::ops
