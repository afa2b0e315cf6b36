// hadamard_gram_: checks, layout, then panels of inner products by at::mm and the kernel of the device, which
// multiplies and adds them. Schema and definition: nestopt_ext/_ops.py.
#include "ops/boxed.h"

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <vector>

#include "cpu/hadamard_gram.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#if defined(NESTOPT_WITH_CUDA)
#include "cuda/hadamard_gram.h"
#include "ops/cuda.h"
#endif

#ifndef _OPENMP
#error "compile with -fopenmp: without it at::parallel_for runs on one thread and says nothing"
#endif

// Of MKL, where torch is built with it.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace nestopt::ops {
namespace {

struct Arguments {
  const at::Tensor* gram;
  const at::Tensor* x;
  const at::Tensor* y;
  int64_t positions;
  bool ones;  // y has one more feature, which is 1
};

void check(const Arguments& a, ListCheck& checks) {
  checks.require("positions", static_cast<double>(a.positions), a.positions >= 1, "be positive");
  checks.leading("gram", *a.gram, kReal);
  checks.rank("gram", *a.gram, 2, "both of examples");
  const int64_t rows = a.gram->size(0);
  checks.shape("gram", *a.gram, a.gram->size(1) == rows, "be square");
  checks.operand("x", *a.x, "gram", *a.gram, factor_dtypes);
  checks.rank("x", *a.x, 2, "rows and features");
  checks.shape("x", *a.x, a.x->size(0) % a.positions == 0 && a.x->size(0) / a.positions == rows,
               "have positions = ", a.positions, " rows for each of the ", rows, " of gram");
  checks.operand("y", *a.y, "x", *a.x, same_dtype);
  checks.rank("y", *a.y, 2, "rows and features");
  const int64_t examples = a.y->size(0) / a.positions;
  checks.shape("y", *a.y, a.y->size(0) % a.positions == 0 && (examples > 0 ? rows % examples == 0 : rows == 0),
               "have positions = ", a.positions, " rows for each of a divisor of ", rows, " examples");
  checks.memory();
}

// Examples [first, first + count), and of each the positions [from, from + positions): all of them, unless it is one.
struct Span {
  int64_t first;
  int64_t count;
  int64_t from;
  int64_t positions;

  int64_t last() const { return first + count; }
  int64_t rows() const { return count * positions; }
};

// Parts of at most so many rows, if that is one or more.
std::vector<Span> cut(const Span& whole, int64_t rows) {
  std::vector<Span> parts;
  if (whole.positions <= rows) {
    const int64_t step = rows / whole.positions;
    for (int64_t first = whole.first; first < whole.last(); first += step) {
      parts.push_back({first, std::min(step, whole.last() - first), whole.from, whole.positions});
    }
    return parts;
  }
  const int64_t step = std::max<int64_t>(rows, 1);
  for (int64_t example = whole.first; example < whole.last(); ++example) {
    for (int64_t at = 0; at < whole.positions; at += step) {
      parts.push_back({example, 1, whole.from + at, std::min(step, whole.positions - at)});
    }
  }
  return parts;
}

// Parts of whole examples, of at most so many rows where one has no more.
std::vector<Span> cut_between_examples(const Span& whole, int64_t rows) {
  return cut(whole, std::max(rows, whole.positions));
}

struct Sizes {
  int64_t panel;  // elements of a panel of inner products
  int64_t tile;   // rows and columns of the inner products of y that are kept while those of several x meet them
};

// The Gram matrix is made in strips: examples of x with themselves and all that come after, as the columns and the rows
// of panels. No entry belongs to two strips, and sums depend on the shapes alone.
//
// Where y has fewer examples than x, its inner products are made once, tile by tile, and kept while all copies of its
// examples in x pass by.
template <class Device>
class HadamardGram {
 public:
  HadamardGram(const Device& device, const at::Tensor& gram, const at::Tensor& x, const at::Tensor& y,
               int64_t positions, bool ones)
      : device_(device),
        gram_(gram),
        x_(narrow_to_math(x)),
        y_(narrow_to_math(y)),
        positions_(positions),
        ones_(ones),
        examples_(y.size(0) / positions),
        copies_(gram.size(0) / examples_),
        // Converting 16 bits gives float32.
        panels_(x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)) {}

  void add() const {
    const Span all{0, examples_, 0, positions_};
    if (copies_ == 1) {
      add_tile(all, all, at::Tensor());
      return;
    }
    const int64_t side = device_.sizes().tile;
    for (const Span& columns : cut_between_examples(all, side)) {
      const Span after{columns.first, examples_ - columns.first, 0, positions_};
      for (const Span& rows : cut(after, std::max<int64_t>(1, side * side / columns.rows()))) {
        add_tile(rows, columns, y_products(rows, columns));
      }
    }
  }

 private:
  const Device& device_;
  const at::Tensor& gram_;
  const at::Tensor x_, y_;
  const int64_t positions_;
  const bool ones_;
  const int64_t examples_;  // of y
  const int64_t copies_;    // of them in x
  const at::TensorOptions panels_;

  // Small factors are converted once, large ones by the rows that are needed.
  static at::Tensor narrow_to_math(const at::Tensor& t) {
    constexpr int64_t kSmall = int64_t{2} << 20;
    return t.itemsize() == 2 && t.numel() <= kSmall ? t.to(at::kFloat) : t;
  }

  at::Tensor rows_of(const at::Tensor& t, const Span& rows) const {
    const at::Tensor part = t.narrow(0, rows.first * positions_ + rows.from, rows.rows());
    return part.itemsize() == 2 ? part.to(at::kFloat) : part;
  }

  std::vector<Span> strips_of(const Span& columns) const {
    const int64_t features = x_.size(1) + (copies_ == 1 ? y_.size(1) : 0);
    return cut_between_examples(columns, device_.strip_rows(gram_.size(0) * positions_, features));
  }

  // The strips come longest, shortest, second longest ..., so that any share of them is as much work.
  static int64_t in_turns(int64_t index, int64_t count) { return index % 2 == 0 ? index / 2 : count - 1 - index / 2; }

  // Inner products of the rows of y with its columns; the columns' own square has both halves.
  at::Tensor y_products(const Span& rows, const Span& columns) const {
    const at::Tensor products = at::empty({rows.rows(), columns.rows()}, panels_);
    const std::vector<Span> strips = strips_of(columns);
    const auto count = static_cast<int64_t>(strips.size());
    const bool square = rows.first == columns.first && rows.positions == positions_;
    device_.for_each_job(count, [&](int64_t first, int64_t last) {
      for (int64_t job = first; job < last; ++job) {
        const Span& strip = strips[in_turns(job, count)];
        const Span needed{square ? strip.first : rows.first, rows.last() - (square ? strip.first : rows.first),
                          rows.from, rows.positions};
        const int64_t at = (strip.first - columns.first) * positions_;
        at::Tensor out = products.narrow(0, products.size(0) - needed.rows(), needed.rows());
        out = out.narrow(1, at, strip.rows());
        multiply(out, rows_of(y_, needed), rows_of(y_, strip).t(), ones_);
        const int64_t end = at + strip.rows();
        if (square && end < columns.rows()) {
          const at::Tensor after = products.narrow(1, at, strip.rows()).narrow(0, end, columns.rows() - end);
          products.narrow(0, at, strip.rows()).narrow(1, end, columns.rows() - end).copy_(after.t());
        }
      }
    });
    return products;
  }

  // Adds all pairs of copies of two sets of examples of y, unordered pairs once: the columns are whole examples, and
  // the rows begin where they do or after them. y_products: of the two; undefined if there is one copy.
  void add_tile(const Span& rows, const Span& columns, const at::Tensor& y_products) const {
    const std::vector<Span> strips = strips_of(columns);
    const auto count = static_cast<int64_t>(strips.size());
    device_.for_each_job(copies_ * count, [&](int64_t first, int64_t last) {
      at::Tensor x_panel, y_panel;
      for (int64_t job = first; job < last; ++job) {
        const int64_t turn = in_turns(job, copies_ * count);
        add_strip(rows, columns, y_products, strips[turn % count], turn / count, x_panel, y_panel);
      }
    });
  }

  void add_strip(const Span& rows, const Span& columns, const at::Tensor& y_products, const Span& strip, int64_t copy,
                 at::Tensor& x_panel, at::Tensor& y_panel) const {
    const Span here{copy * examples_ + strip.first, strip.count, 0, positions_};
    const at::Tensor x_strip = rows_of(x_, here).t();
    const at::Tensor y_strip = y_products.defined() ? at::Tensor() : rows_of(y_, strip).t();
    // Rows [first, last) of the Gram matrix, the first of them example `y_first` among those of the tile.
    const auto add_rows = [&](int64_t first, int64_t last, int64_t y_first) {
      const Span wanted{first, last - first, rows.from, rows.positions};
      for (const Span& part : cut(wanted, device_.sizes().panel / strip.rows())) {
        const at::Tensor x = product(rows_of(x_, part), x_strip, false, x_panel);
        HadamardGramTile tile{.x = x.const_data_ptr(),
                              .y = nullptr,
                              .gram = gram_.mutable_data_ptr(),
                              .x_stride = x.stride(0),
                              .y_stride = 0,
                              .gram_stride = gram_.stride(0),
                              .first_row = part.first,
                              .first_column = here.first,
                              .rows = part.count,
                              .columns = strip.count,
                              .row_positions = part.positions,
                              .column_positions = positions_,
                              .mirrored_from = std::max<int64_t>(0, here.last() - part.first),
                              .y_first = 0,
                              .y_period = part.count};
        if (part.first < here.first) tile.mirrored_from = 0;
        at::Tensor y = y_products;
        if (!y_products.defined()) {
          y = product(rows_of(y_, part), y_strip, ones_, y_panel);
        } else {
          const int64_t example = (y_first + part.first - first) % rows.count;
          y = y.narrow(1, (strip.first - columns.first) * positions_, strip.rows());
          if (part.positions == rows.positions) {
            tile.y_first = example;
            tile.y_period = rows.count;
          } else {
            y = y.narrow(0, example * rows.positions + part.from - rows.from, part.rows());
          }
        }
        tile.y = y.const_data_ptr();
        tile.y_stride = y.stride(0);
        device_.add(tile, x.scalar_type() == at::kDouble, gram_.scalar_type() == at::kDouble);
      }
    };
    if (columns.count == examples_ && rows.positions == positions_) {  // the next copies come right after
      add_rows(here.first, gram_.size(0), strip.first);
      return;
    }
    for (int64_t other = 0; other < copies_; ++other) {
      const int64_t least = other > copy ? rows.first : other == copy ? strip.first : columns.last();
      const int64_t first = std::max(rows.first, least);
      if (first < rows.last()) {
        add_rows(other * examples_ + first, other * examples_ + rows.last(), first - rows.first);
      }
    }
  }

  // a b, or a b + 1, in memory that is kept in `buffer` from call to call.
  at::Tensor product(const at::Tensor& a, const at::Tensor& b, bool plus_one, at::Tensor& buffer) const {
    const int64_t numel = a.size(0) * b.size(1);
    if (!buffer.defined() || buffer.numel() < numel) buffer = at::empty({numel}, panels_);
    at::Tensor out = buffer.narrow(0, 0, numel).view({a.size(0), b.size(1)});
    multiply(out, a, b, plus_one);
    return out;
  }

  static void multiply(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool plus_one) {
    if (plus_one) {
      at::addmm_out(out, out.fill_(1), a, b);
    } else {
      at::mm_out(out, a, b);
    }
  }
};

// While it is there, matrix products that this thread asks for run on this thread alone. Other libraries than MKL see
// to that in a parallel region. MKL, which torch keeps from adapting to its threads, would still cut long sums into as
// many parts as there are threads elsewhere, and results would depend on their number.
class ProductsOnThisThread {
 public:
  ProductsOnThisThread() {
    if (MKL_Set_Num_Threads_Local == nullptr) return;
    at::get_num_threads();  // has torch set the number for a thread that is new to it, which it would do later else
    before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~ProductsOnThisThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  ProductsOnThisThread(const ProductsOnThisThread&) = delete;
  ProductsOnThisThread& operator=(const ProductsOnThisThread&) = delete;

 private:
  int before_ = 0;
};

class Cpu {
 public:
  explicit Cpu(const at::Tensor&) {}

  Sizes sizes() const { return {.panel = 65536, .tile = 1024}; }  // two panels fit the second-level cache

  // Narrow strips make little more than one half of the Gram matrix, but there is a price for each.
  int64_t strip_rows(int64_t all_rows, int64_t features) const {
    constexpr int64_t kUnit = 32, kWorthwhile = int64_t{1} << 19;  // multiplications and additions
    const int64_t least = kWorthwhile / std::max<int64_t>(1, all_rows * features) + 1;
    const int64_t rows = std::max(least, std::min<int64_t>(all_rows / 16, 128));
    return (rows + kUnit - 1) / kUnit * kUnit;
  }

  // A range of at least two makes a parallel region of it, even for one job.
  template <class Body>
  void for_each_job(int64_t count, Body body) const {
    if (at::get_num_threads() == 1 || at::in_parallel_region()) {
      const ProductsOnThisThread alone;
      body(0, count);
      return;
    }
    const at::ThreadLocalState state;
    at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t first, int64_t last) {
      const at::ThreadLocalStateGuard as_the_caller(state);
      const ProductsOnThisThread alone;
      if (first < std::min(last, count)) body(first, std::min(last, count));
    });
  }

  void add(const HadamardGramTile& tile, bool products_are_double, bool gram_is_double) const {
    if (products_are_double) {
      cpu::add_hadamard_tile<double, double>(tile);
    } else if (gram_is_double) {
      cpu::add_hadamard_tile<float, double>(tile);
    } else {
      cpu::add_hadamard_tile<float, float>(tile);
    }
  }
};

#if defined(NESTOPT_WITH_CUDA)
class Cuda {
 public:
  explicit Cuda(const at::Tensor& gram) : on_(gram) {}

  Sizes sizes() const { return {.panel = int64_t{2} << 20, .tile = 1024}; }

  // Launches are what small products cost.
  int64_t strip_rows(int64_t, int64_t) const { return 1024; }

  template <class Body>
  void for_each_job(int64_t count, Body body) const {
    body(0, count);
  }

  void add(const HadamardGramTile& tile, bool products_are_double, bool gram_is_double) const {
    if (products_are_double) {
      C10_CUDA_CHECK((cuda::add_hadamard_tile<double, double>(tile, on_.stream())));
    } else if (gram_is_double) {
      C10_CUDA_CHECK((cuda::add_hadamard_tile<float, double>(tile, on_.stream())));
    } else {
      C10_CUDA_CHECK((cuda::add_hadamard_tile<float, float>(tile, on_.stream())));
    }
  }

 private:
  CurrentDevice on_;
};
#endif

// Rows whose elements, or columns whose elements, lie next to each other, as products take them; a copy of others.
at::Tensor dense(const at::Tensor& t) {
  for (int64_t d : {0, 1}) {
    if ((t.stride(d) == 1 || t.size(d) == 1) && t.stride(1 - d) >= t.size(d)) return t;
  }
  return t.contiguous();
}

template <class Device>
void hadamard_gram_(BoxedArguments next) {
  const Arguments arguments{
      .gram = next.tensor(), .x = next.tensor(), .y = next.tensor(), .positions = next.integer(), .ones = next.flag()};
  ListCheck checks("hadamard_gram_");
  check(arguments, checks);
  checks.bump_versions();
  if (arguments.gram->numel() == 0) return;
  const at::AutoDispatchBelowADInplaceOrView copies_are_ours;
  // What is added is symmetric, so the transpose of the Gram matrix does as well.
  const bool by_columns = arguments.gram->stride(0) == 1 && arguments.gram->stride(1) != 1;
  const at::Tensor target = by_columns ? arguments.gram->t() : *arguments.gram;
  const bool copied = target.size(1) > 1 && target.stride(1) != 1;
  const at::Tensor gram = copied ? target.contiguous() : target;
  const Device device(gram);
  HadamardGram<Device>(device, gram, dense(*arguments.x), dense(*arguments.y), arguments.positions, arguments.ones)
      .add();
  if (copied) target.copy_(gram);
}

}  // namespace

TORCH_LIBRARY_IMPL(nestopt_ext, Autograd, library) { implement_no_derivative(library, "hadamard_gram_"); }
TORCH_LIBRARY_IMPL(nestopt_ext, CPU, library) { implement<hadamard_gram_<Cpu>>(library, "hadamard_gram_"); }
#if defined(NESTOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(nestopt_ext, CUDA, library) { implement<hadamard_gram_<Cuda>>(library, "hadamard_gram_"); }
#endif

}  // namespace nestopt::ops
