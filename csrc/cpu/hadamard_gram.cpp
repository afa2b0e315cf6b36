#include "cpu/hadamard_gram.h"

#include <algorithm>

#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

constexpr int kBlock = 16;           // rows and columns that are transposed at once
constexpr int64_t kColumns = 1024;   // of a panel, whose sums stay in the first-level cache

// A block of at most kBlock rows and kFixed columns; of `columns` if that is 0.
template <class D, class G, int kFixed>
NESTOPT_HD void add_block(const HadamardGramTile& tile, int64_t row, int rows, int64_t column, int num_columns,
                          const D* const* y_rows) {
  const int columns = kFixed > 0 ? kFixed : num_columns;
  G products[kBlock][kBlock];
  for (int i = 0; i < rows; ++i) {
    const D* const x = tile.x_row<D>(row + i) + column;
    const D* const y = y_rows[i] + column;
    G* const gram = tile.entry<G>(row + i, column);
    for (int j = 0; j < columns; ++j) products[i][j] = G{x[j]} * G{y[j]};
    for (int j = 0; j < columns; ++j) gram[j] += products[i][j];
  }
  const int first = static_cast<int>(std::clamp<int64_t>(tile.mirrored_from - row, 0, rows));
  if (first == rows) return;
  for (int j = 0; j < columns; ++j) {
    G* const gram = tile.mirror_entry<G>(row, column + j);
    for (int i = first; i < rows; ++i) gram[i] += products[i][j];
  }
}

template <class D, class G>
NESTOPT_SIMD void add_products(const HadamardGramTile& tile) {
  for (int64_t row = 0; row < tile.rows; row += kBlock) {
    const int rows = static_cast<int>(std::min<int64_t>(tile.rows - row, kBlock));
    const D* y_rows[kBlock];
    for (int i = 0; i < rows; ++i) y_rows[i] = tile.y_row<D>(row + i);
    int64_t column = 0;
    for (; column + kBlock <= tile.columns; column += kBlock) {
      add_block<D, G, kBlock>(tile, row, rows, column, kBlock, y_rows);
    }
    if (column < tile.columns) {
      add_block<D, G, 0>(tile, row, rows, column, static_cast<int>(tile.columns - column), y_rows);
    }
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
