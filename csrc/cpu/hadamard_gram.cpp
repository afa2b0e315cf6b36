#include "cpu/hadamard_gram.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

constexpr int kSide = 8;            // rows and columns that are transposed at once
constexpr int64_t kColumns = 1024;  // of a panel, whose sums stay in the first-level cache

template <class T>
struct SideOf {
  typedef T type __attribute__((vector_size(kSide * sizeof(T))));
};
template <class T>
using Side = typename SideOf<T>::type;

template <class T>
NESTOPT_HD void load_side(Side<T>& side, const T* from) {
  memcpy(&side, from, sizeof side);
}

template <class T>
NESTOPT_HD void add_side(T* to, const Side<T>& side) {
  Side<T> sum;
  load_side(sum, to);
  sum += side;
  memcpy(to, &sum, sizeof sum);
}

// The first or the second half of two sides, element by element in turns.
template <class T>
NESTOPT_HD void interleave(const Side<T>& a, const Side<T>& b, Side<T>& low, Side<T>& high) {
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  using Index = Side<std::conditional_t<sizeof(T) == 8, int64_t, int32_t> >;
  low = __builtin_shuffle(a, b, Index{0, 8, 1, 9, 2, 10, 3, 11});
  high = __builtin_shuffle(a, b, Index{4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

// In three rounds, each of which interleaves the first half of the rows with the second.
template <class T>
NESTOPT_HD void transpose(Side<T> (&rows)[kSide]) {
  for (int round = 0; round < 3; ++round) {
    Side<T> next[kSide];
    for (int i = 0; i < kSide / 2; ++i) interleave<T>(rows[i], rows[i + kSide / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < kSide; ++i) rows[i] = next[i];
  }
}

// kSide rows and columns, at these addresses.
template <class D, class G>
NESTOPT_HD void add_square(const D* x, int64_t x_stride, const D* y, int64_t y_stride, G* gram, G* mirror,
                           int64_t gram_stride) {
  Side<G> products[kSide];
  for (int i = 0; i < kSide; ++i) {
    Side<D> x_side, y_side;
    load_side(x_side, x + i * x_stride);
    load_side(y_side, y + i * y_stride);
    products[i] = __builtin_convertvector(x_side, Side<G>) * __builtin_convertvector(y_side, Side<G>);
    add_side(gram + i * gram_stride, products[i]);
  }
  if (mirror == nullptr) return;
  transpose<G>(products);
  for (int j = 0; j < kSide; ++j) add_side(mirror + j * gram_stride, products[j]);
}

template <class D, class G>
NESTOPT_HD void add_rest(const HadamardGramTile& tile, int64_t row, int rows, int64_t column) {
  for (int64_t r = row; r < row + rows; ++r) {
    for (int64_t c = column; c < tile.columns; ++c) {
      const G product = G{tile.x_row<D>(r)[c]} * G{tile.y_row<D>(r)[c]};
      *tile.entry<G>(r, c) += product;
      if (r >= tile.mirrored_from) *tile.mirror_entry<G>(r, c) += product;
    }
  }
}

// Asks for what a square further down will write to: lines of memory so far apart that nothing else foresees them.
template <class G>
NESTOPT_HD void prefetch_square(const HadamardGramTile& tile, int64_t row, int64_t column) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(G));
  const int64_t next = row + kSide, next_line = row + 2 * kLine;
  if (next + kSide <= tile.rows) {
    for (int i = 0; i < kSide; ++i) __builtin_prefetch(tile.entry<G>(next + i, column), 1);
  }
  if (row % kLine == 0 && next_line < tile.rows) {
    for (int j = 0; j < kSide; ++j) __builtin_prefetch(tile.mirror_entry<G>(next_line, column + j), 1);
  }
}

// All columns of at most kSide rows, of which y has the examples one after another.
template <class D, class G>
NESTOPT_HD void add_rows(const HadamardGramTile& tile, int64_t row, int rows) {
  const bool direct = row + rows <= tile.mirrored_from;
  const bool mirrored = row >= tile.mirrored_from;
  int64_t column = 0;
  if (rows == kSide && (direct || mirrored)) {
    const D* const x = tile.x_row<D>(row);
    const D* const y = tile.y_row<D>(row);
    G* const gram = tile.entry<G>(row, 0);
    for (; column + kSide <= tile.columns; column += kSide) {
      prefetch_square<G>(tile, row, column);
      add_square<D, G>(x + column, tile.x_stride, y + column, tile.y_stride, gram + column,
                       mirrored ? tile.mirror_entry<G>(row, column) : nullptr, tile.gram_stride);
    }
  }
  add_rest<D, G>(tile, row, rows, column);
}

template <class D, class G>
NESTOPT_SIMD void add_products(const HadamardGramTile& tile) {
  for (int64_t row = 0, rows = 0; row < tile.rows; row += rows) {
    const int64_t until_y_comes_again = tile.y_period - (tile.y_first + row) % tile.y_period;
    rows = std::min({tile.rows - row, until_y_comes_again, int64_t{kSide}});
    add_rows<D, G>(tile, row, static_cast<int>(rows));
  }
}

// Products are summed up in double: there may be millions of them.
template <class D, class G>
NESTOPT_SIMD void add_position_sums(const HadamardGramTile& tile) {
  const int64_t positions = tile.column_positions;
  // Columns of the panel that are taken at once: of whole examples, or a part of those of one.
  const int64_t width = positions <= kColumns ? kColumns / positions * positions : kColumns;
  double sums[kColumns];
  for (int64_t row = 0; row < tile.rows; ++row) {
    const D* const x_row = tile.x_row<D>(row);
    const D* const y_row = tile.y_row<D>(row);
    for (int64_t at = 0, n = 0; at < tile.columns * positions; at += n) {
      const int64_t end = positions <= kColumns ? tile.columns * positions : (at / positions + 1) * positions;
      n = std::min(end - at, width);
      std::fill_n(sums, n, 0.0);
      for (int64_t s = 0; s < tile.row_positions; ++s) {
        const D* const x = x_row + s * tile.x_stride + at;
        const D* const y = y_row + s * tile.y_stride + at;
        for (int64_t i = 0; i < n; ++i) sums[i] += G{x[i]} * G{y[i]};
      }
      for (int64_t first = 0, column = at / positions; first < n; first += positions, ++column) {
        double sum = 0;
        for (int64_t i = first; i < std::min(first + positions, n); ++i) sum += sums[i];
        *tile.entry<G>(row, column) += static_cast<G>(sum);
        if (row >= tile.mirrored_from) *tile.mirror_entry<G>(row, column) += static_cast<G>(sum);
      }
    }
  }
}

}  // namespace

// Bytes per element of the panels: read both, which are in the second-level cache; 8 in float32. Per entry of the Gram
// matrix: read and write it and its mirror image, 16 in float32. One multiplication and one addition per element, two
// additions where there is one position.
template <class D, class G>
void add_hadamard_tile(const HadamardGramTile& tile) {
  if (tile.column_positions == 1) {
    add_products<D, G>(tile);
  } else {
    add_position_sums<D, G>(tile);
  }
}

template void add_hadamard_tile<float, float>(const HadamardGramTile&);
template void add_hadamard_tile<float, double>(const HadamardGramTile&);
template void add_hadamard_tile<double, double>(const HadamardGramTile&);

}  // namespace nestopt::cpu
