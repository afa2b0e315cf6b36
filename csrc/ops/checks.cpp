#include "ops/checks.h"

#include <c10/core/GradMode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>

namespace nestopt::ops {
namespace {

constexpr at::ScalarType kFloating[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
constexpr at::ScalarType kReal[] = {at::kFloat, at::kDouble};

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
  const Item* item;
};

c10::ArrayRef<at::ScalarType> same_dtype(at::ScalarType leading) {
  return *std::find(std::begin(kFloating), std::end(kFloating), leading);
}

c10::ArrayRef<at::ScalarType> opmath_dtype(at::ScalarType leading) { return kReal[leading == at::kDouble ? 1 : 0]; }

double cpu_value(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : *t.const_data_ptr<float>();
}

std::string ListCheck::label(const Item& item) {
  return item.index < 0 ? item.name : std::string(item.name) + "[" + std::to_string(item.index) + "]";
}

void ListCheck::finite(const char* name, double value) const {
  TORCH_CHECK_VALUE(std::isfinite(value), op_, ": ", name, " must be finite; got ", value, ".");
}

void ListCheck::strided(const Item& item) const {
  const at::Tensor& t = *item.tensor;
  TORCH_CHECK_TYPE(t.defined(), op_, ": ", label(item), " must be a tensor; got None.");
  TORCH_CHECK_TYPE(
      t.layout() == at::kStrided, op_, ": ", label(item), " must be a strided (dense) tensor; got ", name_of(t.layout()),
      ". Call .to_dense() on it.");
}

void ListCheck::add_written(const Item& item) {
  const at::Tensor& t = *item.tensor;
  TORCH_CHECK_VALUE(
      !(c10::GradMode::is_enabled() && t.requires_grad()), op_, ": ", label(item),
      " must not require grad while grad mode is on; got one that does. Call under torch.no_grad().");
  TORCH_CHECK_VALUE(
      !overlaps_itself(t), op_, ": ", label(item), " must not overlap itself; got shape ", tuple_of(t.sizes()),
      " with strides ", tuple_of(t.strides()), ". Pass a clone.");
  items_.push_back(item);
}

void ListCheck::leading(const char* name, const TensorRefs& tensors) {
  leader_ = name;
  leaders_ = &tensors;
  items_.reserve(4 * tensors.size() + 4);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = *tensors[i];
    const Item item{name, static_cast<int64_t>(i), &t, true};
    strided(item);
    TORCH_CHECK_TYPE(
        contains(kFloating, t.scalar_type()), op_, ": ", label(item), " must be ", either(kFloating), "; got ",
        name_of(t.scalar_type()), ".");
    TORCH_CHECK_VALUE(
        t.device() == tensors[0]->device(), op_, ": ", label(item), " must be on ", tensors[0]->device(), ", the device of ",
        name, "[0]; got ", t.device(), ". Call once per device.");
    add_written(item);
  }
}

void ListCheck::following(const char* name, const TensorRefs& tensors, DtypeRule rule, bool written) {
  TORCH_CHECK_VALUE(
      tensors.size() == leaders_->size(), op_, ": ", name, " must have the length of ", leader_, ", ", leaders_->size(),
      "; got ", tensors.size(), ".");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = *tensors[i];
    const at::Tensor& lead = *(*leaders_)[i];
    const Item item{name, static_cast<int64_t>(i), &t, written};
    const auto other = [&] { return label({leader_, static_cast<int64_t>(i), &lead, true}); };
    strided(item);
    TORCH_CHECK_VALUE(
        t.device() == lead.device(), op_, ": ", label(item), " must be on ", lead.device(), ", the device of ", other(),
        "; got ", t.device(), ".");
    TORCH_CHECK_TYPE(
        contains(rule(lead.scalar_type()), t.scalar_type()), op_, ": ", label(item), " must be ",
        either(rule(lead.scalar_type())), " beside ", other(), " of ", name_of(lead.scalar_type()), "; got ",
        name_of(t.scalar_type()), ".");
    TORCH_CHECK_VALUE(
        t.sizes() == lead.sizes(), op_, ": ", label(item), " must have the shape of ", other(), " ", tuple_of(lead.sizes()),
        "; got ", tuple_of(t.sizes()), ".");
    if (written) {
      add_written(item);
    } else {
      items_.push_back(item);
    }
  }
}

void ListCheck::following_or_empty(
    const char* name, const TensorRefs& tensors, DtypeRule rule, bool needed, const char* needed_while) {
  TORCH_CHECK_VALUE(
      !tensors.empty() || !needed, op_, ": ", name, " must have the length of ", leader_, ", ", leaders_->size(), ", while ",
      needed_while, "; got 0.");
  if (!tensors.empty()) following(name, tensors, rule, true);
}

void ListCheck::scalar(const char* name, const at::Tensor* tensor, bool written, bool on_cpu) {
  if (tensor == nullptr) return;
  const at::Tensor& t = *tensor;
  const Item item{name, -1, &t, written};
  strided(item);
  TORCH_CHECK_TYPE(
      contains(kReal, t.scalar_type()), op_, ": ", name, " must be ", either(kReal), "; got ", name_of(t.scalar_type()), ".");
  TORCH_CHECK_VALUE(t.numel() == 1, op_, ": ", name, " must have one element; got shape ", tuple_of(t.sizes()), ".");
  const at::Device device = leaders_->empty() ? t.device() : leaders_->front()->device();
  TORCH_CHECK_VALUE(
      t.device() == device || (on_cpu && t.is_cpu()), op_, ": ", name, " must be on ",
      on_cpu && !device.is_cpu() ? "cpu or " : "", device, "; got ", t.device(), ".");
  if (written) {
    add_written(item);
  } else {
    items_.push_back(item);
  }
}

void ListCheck::memory() const {
  std::vector<Span> spans;
  spans.reserve(items_.size());
  for (const Item& item : items_) {
    const at::Tensor& t = *item.tensor;
    if (t.numel() == 0) continue;
    const auto itemsize = static_cast<int64_t>(t.itemsize());
    const int64_t bytes = extent(t);
    const c10::StorageImpl* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    const int64_t held = storage != nullptr ? static_cast<int64_t>(storage->nbytes()) : 0;
    TORCH_CHECK_VALUE(
        t.storage_offset() * itemsize + bytes <= held, op_, ": ", label(item),
        " must have storage for its elements; got a storage of ", held, " bytes. It was resized or freed behind the tensor.");
    // Asking for a mutable address first gives a copy-on-write tensor memory of its own.
    const void* address = item.written ? t.mutable_data_ptr() : t.const_data_ptr();
    const auto begin = reinterpret_cast<uintptr_t>(address);
    TORCH_CHECK_VALUE(
        begin % itemsize == 0, op_, ": ", label(item), " must be aligned to its element size, ", itemsize,
        " bytes; got an address that is ", begin % itemsize, " past it. Pass a clone.");
    spans.push_back({begin, begin + static_cast<uintptr_t>(bytes), &item});
  }
  sort_by_begin(spans);
  for (size_t first = 0; first < spans.size();) {
    size_t last = first + 1;
    uintptr_t end = spans[first].end;
    for (; last < spans.size() && spans[last].begin < end; ++last) end = std::max(end, spans[last].end);
    if (last - first > 1) no_sharing(spans.data() + first, spans.data() + last);
    first = last;
  }
}

// Radix sort: with a thousand small tensors a comparison sort would take longer than the update itself.
void ListCheck::sort_by_begin(std::vector<Span>& spans) {
  constexpr int kBits = 11;
  constexpr uintptr_t kMask = (uintptr_t{1} << kBits) - 1;
  constexpr size_t kFew = 64;
  if (spans.size() < kFew) {
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    return;
  }
  uintptr_t all_ones = ~uintptr_t{0};
  uintptr_t any_one = 0;
  for (const Span& span : spans) {
    all_ones &= span.begin;
    any_one |= span.begin;
  }
  const uintptr_t varying = any_one & ~all_ones;
  std::vector<Span> sorted(spans.size());
  for (int shift = 0; shift < 64; shift += kBits) {
    if (((varying >> shift) & kMask) == 0) continue;
    uint32_t place[kMask + 2] = {};
    for (const Span& span : spans) ++place[((span.begin >> shift) & kMask) + 1];
    for (size_t digit = 0; digit < kMask; ++digit) place[digit + 1] += place[digit];
    for (const Span& span : spans) sorted[place[(span.begin >> shift) & kMask]++] = span;
    spans.swap(sorted);
  }
}

// Exact test on tensors whose address ranges overlap: notes the owner of every element that is written, then looks for others
// there. Only interleaved views come this far, and wrong arguments.
void ListCheck::no_sharing(const Span* first, const Span* last) const {
  std::vector<Span> spans(first, last);
  std::stable_sort(
      spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.item->written > b.item->written; });
  if (!spans.front().item->written) return;
  // Every address is a multiple of its element size, so all are multiples of the smallest one.
  int64_t cell = 8;
  uintptr_t end = 0;
  for (const Span& span : spans) {
    cell = std::min(cell, static_cast<int64_t>(span.item->tensor->itemsize()));
    end = std::max(end, span.end);
  }
  std::vector<uint32_t> owners((end - first->begin) / cell, 0);
  for (size_t i = 0; i < spans.size(); ++i) {
    const Item& item = *spans[i].item;
    const int64_t base = static_cast<int64_t>(spans[i].begin - first->begin);
    const int64_t cells = static_cast<int64_t>(item.tensor->itemsize()) / cell;
    uint32_t owner = 0;
    for_each_offset(*item.tensor, [&](int64_t offset) {
      for (int64_t c = 0; c < cells; ++c) {
        uint32_t& mark = owners[(base + offset) / cell + c];
        if (mark != 0) owner = mark;
        if (item.written) mark = static_cast<uint32_t>(i + 1);
      }
    });
    TORCH_CHECK_VALUE(
        owner == 0, op_, ": ", label(*spans[owner == 0 ? 0 : owner - 1].item), " must not share memory with ", label(item),
        "; got overlapping tensors. Pass a clone.");
  }
}

void ListCheck::bump_versions() const {
  for (const Item& item : items_) {
    if (item.written && !item.tensor->is_inference()) item.tensor->unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace nestopt::ops
