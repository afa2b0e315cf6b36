#include "cuda/hadamard_gram.h"

#include <cstring>
#include <vector>

#include "check.h"
#include "cuda/hadamard_gram.cuh"
#include "hadamard_gram_cases.h"

namespace {

using namespace nestopt;

template <class D, class G>
void check_kernel() {
  for (const HadamardShape& shape : hadamard_shapes()) {
    std::vector<G> first;
    for (fibre::seed = 0; fibre::seed < 3; ++fibre::seed) {
      HadamardGramCase<D, G> problem(shape);
      const int64_t before = fibre::launches;
      CHECK((cuda::add_hadamard_tile<D, G>(problem.tile(), nullptr)) == cudaSuccess);
      CHECK(fibre::launches - before == 1);
      problem.expect_right();
      if (first.empty()) first = problem.gram();
      CHECK(std::memcmp(first.data(), problem.gram().data(), first.size() * sizeof(G)) == 0, "seed", fibre::seed);
    }
  }
  fibre::seed = 0;
}

TEST(kernel_float32) { check_kernel<float, float>(); }
TEST(kernel_float32_into_float64) { check_kernel<float, double>(); }
TEST(kernel_float64) { check_kernel<double, double>(); }

// More blocks than squares or entries, and fewer, so that a block takes several.
TEST(any_number_of_blocks) {
  for (uint32_t blocks : {1u, 2u, 5u, 40u}) {
    HadamardGramCase<float, float> one({70, 41, 1, 1, 41, 0, 70}), several({5, 3, 31, 31, 3, 0, 5}), again(several);
    CHECK(cuda::launch(cuda::hadamard_products_kernel<float, float>, blocks, cuda::kTileThreads, nullptr, one.tile()) ==
          cudaSuccess);
    one.expect_right();
    CHECK(cuda::launch(cuda::hadamard_sums_kernel<float, float, 32, 64>, blocks, 64, nullptr, several.tile()) ==
          cudaSuccess);
    several.expect_right();
    CHECK(cuda::launch(cuda::hadamard_sums_kernel<float, float, 64, 64>, blocks, 64, nullptr, again.tile()) ==
          cudaSuccess);
    again.expect_right();
  }
}

TEST(nothing_is_launched_for_nothing) {
  const int64_t before = fibre::launches;
  HadamardGramTile tile{};
  tile.rows = 5;
  CHECK((cuda::add_hadamard_tile<float, float>(tile, nullptr)) == cudaSuccess);
  tile.rows = 0;
  tile.columns = 5;
  CHECK((cuda::add_hadamard_tile<float, float>(tile, nullptr)) == cudaSuccess);
  CHECK(fibre::launches == before);
}

}  // namespace
