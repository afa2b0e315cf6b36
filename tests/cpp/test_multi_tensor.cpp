// The walker itself, with ops that only record. The ops proper are in test_cuda_<stem>.cpp.
#include "cuda/multi_tensor.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "test_list.h"

namespace {

using namespace nestopt;
using namespace nestopt::cuda;

// Adds 1 to each element and counts the chunks that end.
template <class T>
struct Increment {
  using Operands = cuda::Operands<T>;
  struct Arguments {
    int* ends;  // per chunk and thread
  };

  explicit Increment(const Arguments& a) : ends(a.ends) {}
  bool wanted() const { return true; }
  void operator()(T& x) const { x = static_cast<T>(x + 1); }
  void end_chunk(int64_t chunk) const {
    if (ends) ++ends[chunk * kThreads + threadIdx.x];
  }
  int* ends;
};

// Adds to each element the number of its entry.
struct AddRider {
  using Operands = cuda::Operands<float>;
  struct Arguments {};

  explicit AddRider(const Arguments&) {}
  bool wanted() const { return true; }
  void begin_chunk(const void* rider) { number = *static_cast<const float*>(rider); }
  void operator()(float& x) const { x += number; }
  void end_chunk(int64_t) { number = -1; }
  float number = -1;
};

bool all_are_one(const std::vector<int>& counts) {
  return std::all_of(counts.begin(), counts.end(), [](int n) { return n == 1; });
}

TEST(a_chunk_finds_its_entry) {
  std::mt19937 random(1);
  for (int round = 0; round < 50; ++round) {
    Table<FlatEntry<1>> table;
    table.clear(0);
    const int count = 1 + random() % table.kCapacity;
    for (int i = 0; i < count; ++i) table.add({{nullptr}, 1 + static_cast<int64_t>(random() % (4 * kDeviceChunk))});
    uint32_t chunk = 0;
    for (int i = 0; i < count; ++i) {
      for (int64_t n = num_device_chunks(table.entries[i].numel); n > 0; --n, ++chunk) {
        CHECK(table.entry_of(chunk) == i, chunk, table.entry_of(chunk), i);
      }
    }
    CHECK(chunk == table.chunks());
  }
}

TEST(every_element_and_chunk_is_met_once_whatever_the_grid) {
  for (uint32_t max_blocks : {1u, 2u, 7u, kMaxBlocks}) {
    for (fibre::seed = 0; fibre::seed < 2; ++fibre::seed) {
      TestList<float> got(all_shapes(kDeviceChunk, 9)), want(all_shapes(kDeviceChunk, 9));
      want.for_each([](size_t, float& x) { x += 1; });
      std::vector<int> ends(num_device_chunks(got.list) * kThreads);
      CHECK(for_each_element<Increment<float>>(got.list, {ends.data()}, nullptr, max_blocks) == cudaSuccess);
      got.expect_same(want, "with blocks", max_blocks);
      CHECK(all_are_one(ends), "with blocks", max_blocks);
    }
  }
  fibre::seed = 0;
}

TEST(every_chunk_is_told_the_rider_of_its_entry) {
  for (uint32_t max_blocks : {1u, 7u, kMaxBlocks}) {
    TestList<float> got(all_shapes(kDeviceChunk, 9)), want(all_shapes(kDeviceChunk, 9));
    std::vector<float> numbers(1000);
    std::iota(numbers.begin(), numbers.end(), 1.0f);
    want.for_each([&](size_t i, float& x) { x += numbers[i]; });
    const auto list = got.with_rider([&](size_t i) { return &numbers[i]; });
    CHECK(for_each_element<AddRider>(list, {}, nullptr, max_blocks) == cudaSuccess);
    got.expect_same(want, "with blocks", max_blocks);
  }
}

TEST(a_long_list_takes_as_few_launches_as_tables) {
  constexpr int kFlat = Table<FlatEntry<1>>::kCapacity;
  constexpr int kStrided = Table<StridedEntry<1>>::kCapacity;
  for (int extra : {0, 1, kFlat}) {
    std::vector<Shape> shapes;
    for (int i = 0; i < kFlat + extra; ++i) {
      shapes.push_back({{1 + i % 3}});
      if (i % 5 == 0) shapes.push_back({{0}});
    }
    for (int i = 0; i < kStrided + extra % 3; ++i) shapes.push_back({{2, 2}, {{4, 2}}});
    TestList<double> got(shapes), want(shapes);
    want.for_each([](size_t, double& x) { x += 1; });
    std::vector<int> ends(num_device_chunks(got.list) * kThreads);
    const int64_t before = fibre::launches;
    CHECK(for_each_element<Increment<double>>(got.list, {ends.data()}, nullptr, 3) == cudaSuccess);
    CHECK(fibre::launches - before == (extra == 0 ? 1 : 2) + (extra % 3 == 0 ? 1 : 2), fibre::launches - before);
    got.expect_same(want);
    CHECK(all_are_one(ends), "extra", extra);
  }
}

TEST(nothing_to_do_launches_nothing) {
  const int64_t before = fibre::launches;
  TestList<float> none(std::vector<Shape>{}), empty({{{0}}, {{3, 0}}, {{2, 0}, {{1, 2}}}});
  CHECK(for_each_element<Increment<float>>(none.list, {}, nullptr) == cudaSuccess);
  CHECK(for_each_element<Increment<float>>(empty.list, {}, nullptr) == cudaSuccess);
  CHECK(fibre::launches == before && num_device_chunks(empty.list) == 0);
}

// Runs the last two blocks over an entry of more than 2^32 bytes, of which only the pages that are touched exist.
template <class Entry>
void check_last_blocks(TensorList<1>& list, std::vector<Entry>& entries, Entry entry) {
  const int64_t numel = entry.numel;
  void* const data = mmap(nullptr, numel, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(data != MAP_FAILED);
  entry.data[0] = data;
  entries.push_back(entry);
  list.finish();
  fibre::first_block = static_cast<unsigned>(num_device_chunks(list)) - 2;
  CHECK(for_each_element<Increment<int8_t>>(list, {}, nullptr, UINT32_MAX) == cudaSuccess);
  fibre::first_block = 0;
  const int64_t rest = numel % kDeviceChunk + kDeviceChunk;
  const int8_t* const bytes = static_cast<const int8_t*>(data);
  const auto sum = [&](int64_t begin, int64_t end) { return std::accumulate(bytes + begin, bytes + end, int64_t{0}); };
  CHECK(sum(numel - rest, numel) == rest && sum(numel - rest - 4096, numel - rest) == 0, sum(numel - rest, numel));
  for (int64_t wrapped : {int64_t{0}, int64_t{1} << 31, int64_t{1} << 32}) {
    CHECK(sum(wrapped, wrapped + 2 * kDeviceChunk) == 0, wrapped);
  }
  munmap(data, numel);
}

TEST(flat_elements_beyond_2_32) {
  TensorList<1> list;
  check_last_blocks(list, list.flat, {{nullptr}, (int64_t{1} << 32) + 5 * kDeviceChunk + 77});
}

TEST(strided_elements_beyond_2_32) {
  const int64_t rows = (1 << 20) + 5;
  StridedEntry<1> entry{{nullptr}, rows * 4099, 2, {rows, 4099}, {{4099, 1}}};
  TensorList<1> list;
  check_last_blocks(list, list.strided, entry);
}

TEST(strided_elements_are_located) {
  StridedEntry<2> entry{};
  entry.ndim = 3;
  const int64_t sizes[] = {3000, 2000, 1000};
  const int64_t strides[][3] = {{2'000'000, 1000, 1}, {1, 3000, 6'000'000}};
  entry.numel = 1;
  for (int d = 0; d < 3; ++d) {
    entry.sizes[d] = sizes[d];
    entry.numel *= sizes[d];
    for (int k = 0; k < 2; ++k) entry.strides[k][d] = strides[k][d];
  }
  std::mt19937_64 random(2);
  for (int round = 0; round < 1000; ++round) {
    const uint64_t at = round == 0 ? entry.numel - 1 : random() % entry.numel;
    int64_t offsets[2];
    locate(entry, at, offsets);
    CHECK(offsets[0] == static_cast<int64_t>(at), at, offsets[0]);
    const int64_t want = at / 2'000'000 + at / 1000 % 2000 * 3000 + at % 1000 * 6'000'000;
    CHECK(offsets[1] == want, at, offsets[1], want);
    int64_t narrow[2];
    locate(entry, static_cast<uint32_t>(at), narrow);
    if (at <= UINT32_MAX) CHECK(narrow[0] == offsets[0] && narrow[1] == offsets[1], at);
  }
  const StridedEntry<1> long_row{{nullptr}, int64_t{1} << 33, 1, {int64_t{1} << 33}, {{3}}};
  int64_t offset[1];
  locate(long_row, uint64_t{(1ull << 33) - 1}, offset);
  CHECK(offset[0] == 3 * ((int64_t{1} << 33) - 1), offset[0]);
}

}  // namespace
