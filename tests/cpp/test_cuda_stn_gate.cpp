#include "cuda/stn_gate.h"

#include <cstring>
#include <vector>

#include "check.h"
#include "cuda/stn_gate.cuh"
#include "stn_gate_cases.h"

namespace {

using namespace nestopt;

template <class T>
void expect_same(std::vector<T>& first, const std::vector<T>& now) {
  if (first.empty()) first = now;
  CHECK(std::memcmp(first.data(), now.data(), now.size() * sizeof(T)) == 0, "seed", fibre::seed);
}

template <class X, class G>
void check_kernels() {
  for (const StnGateSizes& sizes : kStnGateSizes) {
    std::vector<X> out;
    std::vector<math_t<X>> sums, shared;
    for (fibre::seed = 0; fibre::seed < 2; ++fibre::seed) {
      StnGateCase<X, G> problem(sizes);
      const StnGateBackward backward = problem.backward();
      const int64_t before = fibre::launches;
      CHECK((cuda::stn_gate<X, G>(problem.forward(), nullptr)) == cudaSuccess);
      problem.expect_forward();
      expect_same(out, problem.out());
      CHECK((cuda::stn_gate_backward<X, G>(backward, nullptr)) == cudaSuccess);
      CHECK(fibre::launches - before == (backward.pieces() > 1 ? 4 : 3));
      problem.expect_backward();
      expect_same(sums, problem.sums());
      expect_same(shared, problem.shared());
    }
    fibre::seed = 0;
    StnGateCase<X, G> problem(sizes);
    CHECK((cuda::stn_gate<X, G>(problem.forward(false, false), nullptr)) == cudaSuccess);
    problem.expect_forward(false, false);
    CHECK((cuda::stn_gate_backward<X, G>(problem.backward(false, false, false), nullptr)) == cudaSuccess);
    problem.expect_backward(false, false, false);
    CHECK((cuda::stn_gate_backward<X, G>(problem.backward(false, true, true, false), nullptr)) == cudaSuccess);
    problem.expect_backward(false, true, true, false);
  }
}

TEST(kernels_float32) { check_kernels<float, float>(); }
TEST(kernels_float64) { check_kernels<double, double>(); }
TEST(kernels_bfloat16) { check_kernels<BFloat16, BFloat16>(); }
TEST(kernels_bfloat16_with_float32) { check_kernels<BFloat16, float>(); }
TEST(kernels_float16) { check_kernels<Float16, Float16>(); }
TEST(kernels_float16_with_float32) { check_kernels<Float16, float>(); }

// More units than groups, and fewer, so that a group takes several.
TEST(any_number_of_blocks) {
  for (uint32_t blocks : {1u, 2u, 5u, 40u}) {
    StnGateCase<float, float> forward({3, 2, 5, 150, 1}), rows({1, 2, 20, 70, 1}), few({1, 5, 3, 70, 1}),
        runs({1, 2, 3, 5, 70}), long_runs({1, 2, 2, 3, 600});
    CHECK(cuda::launch(cuda::stn_gate_kernel<float, float, 64>, blocks, 64, nullptr, forward.forward()) == cudaSuccess);
    forward.expect_forward();
    CHECK(cuda::launch(cuda::stn_gate_backward_rows_kernel<float, float, 2, 64>, blocks, 64, nullptr,
                       rows.backward(true, true, false)) == cudaSuccess);
    rows.expect_backward(true, true, false);
    CHECK(cuda::launch(cuda::stn_gate_backward_rows_kernel<float, float, 1, 64>, blocks, 64, nullptr,
                       few.backward(true, true, false)) == cudaSuccess);
    few.expect_backward(true, true, false);
    CHECK(cuda::launch(cuda::stn_gate_backward_runs_kernel<float, float, 32, 64>, blocks, 64, nullptr,
                       runs.backward(true, true, false)) == cudaSuccess);
    runs.expect_backward(true, true, false);
    CHECK(cuda::launch(cuda::stn_gate_backward_runs_kernel<float, float, 64, 64>, blocks, 64, nullptr,
                       long_runs.backward(true, true, false)) == cudaSuccess);
    long_runs.expect_backward(true, true, false);
    StnGateCase<float, float> fold({1, 7, 1, 70, 1});
    const StnGateBackward backward = fold.backward();
    CHECK((cuda::stn_gate_backward<float, float>(fold.backward(true, true, false), nullptr)) == cudaSuccess);
    CHECK(cuda::launch(cuda::stn_gate_fold_kernel<float, float, 64>, blocks, 64, nullptr, backward) == cudaSuccess);
    fold.expect_backward();
  }
}

TEST(nothing_is_launched_for_nothing) {
  const int64_t before = fibre::launches;
  for (const StnGateSizes& sizes : std::vector<StnGateSizes>{{1, 0, 1, 3, 1}, {1, 3, 1, 0, 1}, {0, 3, 1, 2, 1}}) {
    StnGate gate{};
    gate.sizes = sizes;
    CHECK((cuda::stn_gate<float, float>(gate, nullptr)) == cudaSuccess);
    StnGateBackward backward{};
    backward.sizes = sizes;
    CHECK((cuda::stn_gate_backward<float, float>(backward, nullptr)) == cudaSuccess);
  }
  CHECK(fibre::launches == before);
}

}  // namespace
