#include "cpu/stn_gate.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "stn_gate_cases.h"
#include "threads.h"

namespace {

using namespace nestopt;

template <class X, class G>
void run(const StnGate& gate, int num_threads) {
  in_threads(cpu::stn_gate_count(gate), num_threads,
             [&](int64_t begin, int64_t end) { cpu::stn_gate_units<X, G>(gate, begin, end); });
}

template <class X, class G>
void run(const StnGateBackward& backward, int num_threads) {
  in_threads(cpu::stn_gate_backward_count(backward), num_threads,
             [&](int64_t begin, int64_t end) { cpu::stn_gate_backward_units<X, G>(backward, begin, end); });
  for (int64_t i = 0; backward.partials != nullptr && i < backward.num_sums(); ++i) {
    backward.add_partials<math_t<X>>(i);
  }
  if (backward.shared == nullptr) return;
  in_threads(cpu::stn_gate_fold_count(backward), num_threads,
             [&](int64_t begin, int64_t end) { cpu::stn_gate_fold_units<X, G>(backward, begin, end); });
}

template <class T>
void expect_same(std::vector<T>& first, const std::vector<T>& now, int num_threads) {
  if (first.empty()) first = now;
  CHECK(std::memcmp(first.data(), now.data(), now.size() * sizeof(T)) == 0, num_threads, "threads");
}

template <class X, class G>
void check_kernels() {
  for (const StnGateSizes& sizes : kStnGateSizes) {
    std::vector<X> out;
    std::vector<math_t<X>> sums, shared;
    for (int num_threads : {1, 3}) {
      StnGateCase<X, G> problem(sizes);
      run<X, G>(problem.forward(), num_threads);
      problem.expect_forward();
      expect_same(out, problem.out(), num_threads);
      run<X, G>(problem.backward(), num_threads);
      problem.expect_backward();
      expect_same(sums, problem.sums(), num_threads);
      expect_same(shared, problem.shared(), num_threads);
    }
    StnGateCase<X, G> problem(sizes);
    run<X, G>(problem.forward(false, false), 1);
    problem.expect_forward(false, false);
    run<X, G>(problem.backward(false, false, false), 1);
    problem.expect_backward(false, false, false);
    run<X, G>(problem.backward(false, true, true, false), 1);
    problem.expect_backward(false, true, true, false);
  }
}

TEST(cpu_kernels_float32) { check_kernels<float, float>(); }
TEST(cpu_kernels_float64) { check_kernels<double, double>(); }
TEST(cpu_kernels_bfloat16) { check_kernels<BFloat16, BFloat16>(); }
TEST(cpu_kernels_bfloat16_with_float32) { check_kernels<BFloat16, float>(); }
TEST(cpu_kernels_float16) { check_kernels<Float16, Float16>(); }
TEST(cpu_kernels_float16_with_float32) { check_kernels<Float16, float>(); }

TEST(quotients_of_any_size) {
  for (int64_t x : {int64_t{0}, int64_t{7}, (int64_t{1} << 32) - 1, int64_t{1} << 32, (int64_t{1} << 40) + 5}) {
    for (int64_t y : {int64_t{1}, int64_t{3}, (int64_t{1} << 32) - 1, int64_t{1} << 33}) {
      CHECK(quotient(x, y) == x / y, x, y);
    }
  }
}

}  // namespace
