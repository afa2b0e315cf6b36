// Inner products of rows: out[i] += sum_d x[i, d] y[i mod M, d]. The definition is row_dot_ in
// nestopt_ext/_reference.py.
//
// A row is cut into pieces, so that a few long rows too keep many threads busy. What is added up, and in which order,
// depends on the number of columns alone. Sums in float32 are short; they are added up in double.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/half.h"
#include "math/platform.h"

namespace nestopt {

// Rows of x and y, whose elements lie next to each other; strides count elements.
struct RowDots {
  static constexpr int64_t kPiece = 65536;  // columns

  void* out;
  const void* x;
  const void* y;
  double* partials;  // a number for each unit; null if rows are of one piece
  bool out_is_double;
  int64_t rows;
  int64_t y_rows;
  int64_t columns;
  int64_t out_stride;
  int64_t x_stride;
  int64_t y_stride;

  NESTOPT_HD int64_t pieces() const { return (columns + kPiece - 1) / kPiece; }

  // A unit of work is a piece of one row; rows take turns, since they may share their y.
  NESTOPT_HD int64_t units() const { return rows * pieces(); }
  NESTOPT_HD int64_t row_of(int64_t unit) const { return unit % rows; }
  NESTOPT_HD int64_t begin_of(int64_t unit) const { return unit / rows * kPiece; }
  NESTOPT_HD int64_t size_of(int64_t unit) const {
    const int64_t rest = columns - begin_of(unit);
    return rest < kPiece ? rest : kPiece;
  }
  template <class X>
  NESTOPT_HD const X* x_of(int64_t unit) const {
    return static_cast<const X*>(x) + row_of(unit) * x_stride + begin_of(unit);
  }
  template <class X>
  NESTOPT_HD const X* y_of(int64_t unit) const {
    return static_cast<const X*>(y) + row_of(unit) % y_rows * y_stride + begin_of(unit);
  }

  NESTOPT_HD void add(int64_t row, double dot) const {
    const int64_t at = row * out_stride;
    if (out_is_double) {
      static_cast<double*>(out)[at] += dot;
    } else {
      float& sum = static_cast<float*>(out)[at];
      sum = static_cast<float>(sum + dot);
    }
  }
  NESTOPT_HD void keep(int64_t unit, double dot) const {
    if (partials != nullptr) {
      partials[unit] = dot;
    } else {
      add(unit, dot);
    }
  }
  // Once all units are there.
  NESTOPT_HD void add_partials(int64_t row) const {
    double dot = 0;
    for (int64_t piece = 0; piece < pieces(); ++piece) dot += partials[piece * rows + row];
    add(row, dot);
  }
};

}  // namespace nestopt
