// The Gram matrix of the matrices A_n = sum_t x_nt y_nt', which are never formed: its entry (n, m) is the sum over
// positions s and t of (x_ns . x_mt) (y_ns . y_mt). The definition is hadamard_gram_ in nestopt_ext/_reference.py.
//
// Inner products of rows of x, and of y, come in panels, made by a matrix product. A tile is what one panel of each
// adds to the Gram matrix: they are multiplied, summed over the positions of each pair of examples, and added, all in
// one pass. Of the symmetric result one half is made; what lies off the diagonal is added to its mirror image as well.
#pragma once

#include <cstdint>

#include "math/platform.h"

namespace nestopt {

// Panels have the positions of one example after another, in rows and in columns. Their elements lie next to each other
// in a row, as those of the Gram matrix do; strides between rows count elements.
struct HadamardGramTile {
  const void* x;  // inner products, of type D
  const void* y;  // of the same columns; for its rows see y_row
  void* gram;     // of type G
  int64_t x_stride;
  int64_t y_stride;
  int64_t gram_stride;
  int64_t first_row;  // where the tile lies in the Gram matrix
  int64_t first_column;
  int64_t rows;  // of the Gram matrix, as all that follows
  int64_t columns;
  int64_t row_positions;  // positions of each row; fewer than of a column where they are taken in parts
  int64_t column_positions;
  int64_t mirrored_from;  // rows from this one on have a mirror image
  int64_t y_first;        // examples in y come again after `y_period` of them
  int64_t y_period;

  template <class D>
  NESTOPT_HD const D* x_row(int64_t row) const {
    return static_cast<const D*>(x) + row * row_positions * x_stride;
  }
  template <class D>
  NESTOPT_HD const D* y_row(int64_t row) const {
    return static_cast<const D*>(y) + (y_first + row) % y_period * row_positions * y_stride;
  }
  template <class G>
  NESTOPT_HD G* entry(int64_t row, int64_t column) const {
    return static_cast<G*>(gram) + (first_row + row) * gram_stride + first_column + column;
  }
  template <class G>
  NESTOPT_HD G* mirror_entry(int64_t row, int64_t column) const {
    return static_cast<G*>(gram) + (first_column + column) * gram_stride + first_row + row;
  }
};

}  // namespace nestopt
