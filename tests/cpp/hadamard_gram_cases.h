// Tiles to try the kernels of hadamard_gram on, with their results in extended precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "math/hadamard_gram.h"

struct HadamardShape {
  int64_t rows, columns, row_positions, column_positions;
  int64_t mirrored_from;  // and rows before it lie on the diagonal, as far as there are columns
  int64_t y_first, y_period;
};

// Around the squares that are transposed, with a mirror image and without; examples of y that come again; positions;
// a part of those of one row.
inline std::vector<HadamardShape> hadamard_shapes() {
  std::vector<HadamardShape> shapes;
  for (int64_t rows : {1, 7, 8, 9, 32, 33, 70}) {
    for (int64_t columns : {1, 8, 15, 32, 41}) {
      shapes.push_back({rows, columns, 1, 1, 0, 0, rows});
      shapes.push_back({rows, columns, 1, 1, std::min(rows, columns), 0, rows});
      shapes.push_back({rows, columns, 1, 1, 0, 2, 5});
      shapes.push_back({rows, columns, 1, 1, 0, 9, 24});
    }
  }
  for (int64_t positions : {2, 3, 31, 100}) {
    shapes.push_back({5, 3, positions, positions, 0, 0, 5});
    shapes.push_back({5, 3, positions, positions, 3, 0, 5});
    shapes.push_back({7, 2, positions, positions, 0, 2, 3});
    shapes.push_back({1, 3, 1, positions, 0, 0, 1});
    shapes.push_back({1, 3, positions - 1, positions, 1, 0, 1});
  }
  shapes.push_back({2, 2, 3, 1023, 0, 0, 2});
  shapes.push_back({1, 2, 3, 1025, 0, 0, 1});
  shapes.push_back({1, 1, 2, 2500, 1, 0, 1});
  return shapes;
}

// The Gram matrix is larger than the tile, and what is not of it stays. Panels have gaps that hold NaN; all arrays end
// with the last element, so that AddressSanitizer sees a step too far.
template <class D, class G>
class HadamardGramCase {
 public:
  explicit HadamardGramCase(const HadamardShape& shape) : shape_(shape) {
    std::mt19937 random(static_cast<unsigned>(shape.rows * 100 + shape.columns));
    std::normal_distribution<double> normal;
    // Rows that lie on the diagonal begin with it; others come after all columns.
    first_row_ = shape.mirrored_from > 0 ? kFirstColumn : kFirstColumn + shape.columns + 1;
    const int64_t y_examples = std::min(shape.y_period, shape.y_first + shape.rows);
    const int64_t width = shape.columns * shape.column_positions;
    x_stride_ = width + 3;
    y_stride_ = width + 1;
    const auto fill = [&](std::vector<D>& panel, int64_t rows, int64_t stride) {
      panel.assign((rows - 1) * stride + width, static_cast<D>(NAN));
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; ++c) panel[r * stride + c] = static_cast<D>(normal(random));
      }
    };
    fill(x_, shape.rows * shape.row_positions, x_stride_);
    fill(y_, y_examples * shape.row_positions, y_stride_);
    size_ = std::max(first_row_ + shape.rows, kFirstColumn + shape.columns);
    gram_stride_ = size_ + 2;
    for (int64_t i = 0; i < (size_ - 1) * gram_stride_ + size_; ++i) gram_.push_back(static_cast<G>(normal(random)));
    before_ = gram_;
  }

  nestopt::HadamardGramTile tile() {
    return {.x = x_.data(),
            .y = y_.data(),
            .gram = gram_.data(),
            .x_stride = x_stride_,
            .y_stride = y_stride_,
            .gram_stride = gram_stride_,
            .first_row = first_row_,
            .first_column = kFirstColumn,
            .rows = shape_.rows,
            .columns = shape_.columns,
            .row_positions = shape_.row_positions,
            .column_positions = shape_.column_positions,
            .mirrored_from = shape_.mirrored_from,
            .y_first = shape_.y_first,
            .y_period = shape_.y_period};
  }
  const std::vector<G>& gram() const { return gram_; }

  void expect_right() const {
    using Long = long double;
    std::vector<Long> want(before_.begin(), before_.end()), size(before_.size());
    for (size_t i = 0; i < want.size(); ++i) size[i] = std::abs(want[i]);
    for (int64_t row = 0; row < shape_.rows; ++row) {
      for (int64_t column = 0; column < shape_.columns; ++column) {
        Long sum = 0, absolute = 0;
        for (int64_t s = 0; s < shape_.row_positions; ++s) {
          const int64_t y_row = (shape_.y_first + row) % shape_.y_period * shape_.row_positions + s;
          for (int64_t t = 0; t < shape_.column_positions; ++t) {
            const int64_t at = column * shape_.column_positions + t;
            const Long product =
                Long{x_[(row * shape_.row_positions + s) * x_stride_ + at]} * Long{y_[y_row * y_stride_ + at]};
            sum += product;
            absolute += std::abs(product);
          }
        }
        const auto add = [&](int64_t i, int64_t j) {
          want[i * gram_stride_ + j] += sum;
          size[i * gram_stride_ + j] += absolute;
        };
        add(first_row_ + row, kFirstColumn + column);
        if (row >= shape_.mirrored_from) add(kFirstColumn + column, first_row_ + row);
      }
    }
    const Long rounding = std::is_same_v<D, double> ? 0x1p-52 : 0x1p-23;
    for (size_t i = 0; i < want.size(); ++i) {
      const bool untouched = want[i] == before_[i];
      CHECK(std::abs(gram_[i] - want[i]) <= (untouched ? 0 : 3 * size[i] * rounding), "at", i, "of rows", shape_.rows,
            "columns", shape_.columns, "positions", shape_.row_positions, shape_.column_positions, gram_[i],
            double(want[i]));
    }
  }

 private:
  static constexpr int64_t kFirstColumn = 2;

  HadamardShape shape_;
  int64_t first_row_, x_stride_, y_stride_, gram_stride_, size_;
  std::vector<D> x_, y_;
  std::vector<G> gram_, before_;
};
