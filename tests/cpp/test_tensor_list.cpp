#include "math/tensor_list.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/list_walker.h"

namespace {

using nestopt::kChunk;
using nestopt::kMaxDims;
using nestopt::TensorList;

using Pair = std::array<int64_t, 2>;  // byte offsets of an element in both operands
using Sizes = std::vector<int64_t>;

constexpr int64_t kElementSizes[2] = {4, 2};

TensorList<2> make_list(const Sizes& sizes, const Sizes& strides_0, const Sizes& strides_1) {
  TensorList<2> list;
  Sizes strides[2] = {strides_0, strides_1};
  nestopt::add_strided<2>(list, {nullptr, nullptr}, kElementSizes, sizes, strides);
  list.finish();
  return list;
}

// The elements of a list of null addresses, as the walker over chunks [first, last) gives them.
std::vector<Pair> walk(const TensorList<2>& list, int64_t first, int64_t last) {
  std::vector<Pair> pairs;
  nestopt::cpu::for_each_run(list, kElementSizes, first, last, [&](int64_t, const nestopt::cpu::Run<2>& run) {
    for (int64_t i = 0; i < run.length; ++i) {
      Pair pair;
      for (int k = 0; k < 2; ++k) {
        pair[k] = reinterpret_cast<intptr_t>(run.data[k]) + i * run.strides[k] * kElementSizes[k];
      }
      pairs.push_back(pair);
    }
  });
  return pairs;
}

std::vector<Pair> enumerate(const Sizes& sizes, const Sizes& strides_0, const Sizes& strides_1) {
  std::vector<Pair> pairs;
  const int64_t numel = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  for (int64_t n = 0; n < numel; ++n) {
    Pair pair{};
    int64_t rest = n;
    for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) {
      pair[0] += rest % sizes[d] * strides_0[d] * kElementSizes[0];
      pair[1] += rest % sizes[d] * strides_1[d] * kElementSizes[1];
    }
    pairs.push_back(pair);
  }
  return pairs;
}

Sizes dense_strides(const Sizes& sizes, const std::vector<size_t>& order, int64_t gap) {
  Sizes strides(sizes.size());
  int64_t step = gap;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = step;
    step *= sizes[order[i]];
  }
  return strides;
}

TEST(contiguous_dimensions_join) {
  const TensorList<2> list = make_list({2, 3, 4}, {12, 4, 1}, {12, 4, 1});
  CHECK(list.strided.size() == 1 && list.strided[0].ndim == 1);
  CHECK(list.strided[0].sizes[0] == 24 && list.strided[0].strides[0][0] == 1);
}

TEST(dimensions_join_whatever_their_order) {
  const TensorList<2> list = make_list({4, 2, 3}, {1, 12, 4}, {2, 24, 8});
  CHECK(list.strided.size() == 1 && list.strided[0].ndim == 1, list.strided[0].ndim);
  CHECK(list.strided[0].strides[1][0] == 2);
}

TEST(dimensions_join_only_where_every_operand_lets_them) {
  const TensorList<2> list = make_list({2, 3, 4}, {12, 4, 1}, {4, 8, 1});
  CHECK(list.strided[0].ndim == 3, list.strided[0].ndim);
  const TensorList<2> half = make_list({2, 3, 4}, {12, 4, 1}, {100, 4, 1});
  CHECK(half.strided[0].ndim == 2, half.strided[0].ndim);
}

TEST(sizes_of_one_vanish) {
  const TensorList<2> list = make_list({1, 5, 1}, {77, 1, 3}, {1, 1, 99});
  CHECK(list.strided[0].ndim == 1 && list.strided[0].numel == 5);
}

TEST(one_element_is_an_entry) {
  for (const Sizes& sizes : {Sizes{}, Sizes{1, 1}}) {
    const TensorList<2> list = make_list(sizes, Sizes(sizes.size(), 5), Sizes(sizes.size(), 9));
    CHECK(list.chunks() == 1 && list.numel() == 1);
    CHECK(walk(list, 0, 1) == (std::vector<Pair>{{0, 0}}));
  }
}

TEST(an_empty_tensor_has_no_chunks) {
  CHECK(make_list({3, 0, 2}, {2, 2, 1}, {1, 3, 3}).chunks() == 0);
  const Sizes many = {2, 0, 2, 2, 2, 2, 2, 2, 2, 2};
  const Sizes up = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};
  const Sizes down(up.rbegin(), up.rend());
  CHECK(make_list(many, down, up).chunks() == 0);
}

TEST(too_many_dimensions_are_cut) {
  const Sizes sizes(kMaxDims + 2, 2);
  Sizes up(sizes.size());
  for (size_t d = 0; d < up.size(); ++d) up[d] = int64_t{1} << d;
  const Sizes down(up.rbegin(), up.rend());
  const TensorList<2> list = make_list(sizes, down, up);
  CHECK(list.strided.size() == 4 && list.strided[0].ndim == kMaxDims);
  CHECK(list.numel() == 1024);
}

TEST(chunks_are_counted_per_tensor) {
  TensorList<1> list;
  for (int64_t numel : {int64_t{0}, int64_t{1}, kChunk, kChunk + 1, int64_t{0}, 3 * kChunk})
    list.flat.push_back({{nullptr}, numel});
  list.finish();
  CHECK(list.first_chunk == (std::vector<int64_t>{0, 0, 1, 2, 4, 4, 7}));
  CHECK(list.chunks() == 7 && list.numel() == 5 * kChunk + 2);
  TensorList<1> nothing;
  CHECK(nothing.chunks() == 0);
  nothing.finish();
  CHECK(nothing.chunks() == 0 && nothing.numel() == 0);
}

TEST(a_split_of_the_elements_splits_the_chunks) {
  std::mt19937 random(9);
  for (int round = 0; round < 100; ++round) {
    TensorList<1> list;
    for (int n = random() % 8; n > 0; --n) {
      list.flat.push_back({{nullptr}, static_cast<int64_t>(random() % (random() % 3 ? 50 : 9 * kChunk))});
    }
    list.finish();
    CHECK(list.chunk_from(0) == 0 || list.numel() == 0, list.chunk_from(0));
    CHECK(list.chunk_from(list.numel()) == list.chunks(), "round", round);
    int64_t previous = 0;
    for (int64_t element = 0; element < list.numel(); element += 1 + random() % kChunk) {
      const int64_t chunk = list.chunk_from(element);
      CHECK(previous <= chunk && chunk <= list.chunks(), "round", round, "element", element);
      int64_t before = 0;  // elements in chunks before this one
      for (int64_t i = 0; i < list.entries(); ++i) {
        before += std::clamp((chunk - list.first_chunk[i]) * kChunk, int64_t{0}, list.entry_numel(i));
      }
      CHECK(before >= element && before - element < kChunk, "round", round, "element", element, "before", before);
      previous = chunk;
    }
  }
}

TEST(random_layouts_are_walked_once) {
  std::mt19937 random(3);
  for (int round = 0; round < 400; ++round) {
    const size_t ndim = random() % 11;
    Sizes sizes(ndim);
    for (int64_t& size : sizes) size = 1 + random() % (ndim > 6 ? 3 : 6);
    std::vector<size_t> order(ndim);
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), random);
    const Sizes strides_0 = dense_strides(sizes, order, 1 + random() % 2);
    if (random() % 2) std::shuffle(order.begin(), order.end(), random);
    Sizes strides_1 = dense_strides(sizes, order, 1 + random() % 3);
    if (ndim > 0 && random() % 4 == 0) strides_1[random() % ndim] = 0;  // expanded

    const TensorList<2> list = make_list(sizes, strides_0, strides_1);
    std::vector<Pair> got;
    for (int64_t chunk = 0; chunk < list.chunks(); ++chunk) {
      for (const Pair& pair : walk(list, chunk, chunk + 1)) got.push_back(pair);
    }
    CHECK(got == walk(list, 0, list.chunks()), "round", round);
    std::vector<Pair> want = enumerate(sizes, strides_0, strides_1);
    std::sort(got.begin(), got.end());
    std::sort(want.begin(), want.end());
    CHECK(got == want, "round", round);
  }
}

TEST(addresses_are_right_beyond_2_31_elements) {
  const int64_t numel = (int64_t{1} << 33) + 5;
  TensorList<2> list;
  list.flat.push_back({{nullptr, nullptr}, numel});
  Sizes strides[2] = {{1, 70'000}, {70'000, 1}};
  nestopt::add_strided<2>(list, {nullptr, nullptr}, kElementSizes, {70'000, 70'000}, strides);
  list.finish();
  CHECK(list.chunks() == numel / kChunk + 1 + (int64_t{70'000} * 70'000 + kChunk - 1) / kChunk);
  const std::vector<Pair> flat = walk(list, list.first_chunk[1] - 1, list.first_chunk[1]);
  CHECK(flat.size() == 5 && flat.back() == (Pair{(numel - 1) * 4, (numel - 1) * 2}));
  const std::vector<Pair> strided = walk(list, list.chunks() - 1, list.chunks());
  const int64_t last = int64_t{70'000} * 70'000 - 1;
  CHECK(strided.back() == (Pair{last * 4, last * 2}), strided.back()[0], strided.back()[1]);
}

}  // namespace
