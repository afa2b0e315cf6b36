// Times the CPU kernels beside a triad, per byte: bench_kernels [elements [threads]].
//
// Bytes are those that the source names. A triad has the memory read what it is about to write as well, 16 bytes
// for 12, and the kernels do not, so they come out below 1.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/complex_adam.h"
#include "cpu/complex_sgd.h"
#include "cpu/neumann.h"
#include "cpu/simd.h"
#include "threads.h"

namespace {

using nestopt::TensorList;

NESTOPT_SIMD void triad(int64_t n, float* __restrict a, const float* __restrict b, const float* __restrict c) {
  for (int64_t i = 0; i < n; ++i) a[i] = b[i] + 0.5f * c[i];
}

struct Case {
  std::string name;
  double bytes;
  std::function<void()> run;
  std::vector<double> seconds = {};

  double median() {
    std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
    return seconds[seconds.size() / 2];
  }
};

// A list of 16 tensors over the given arrays, which share the riders.
template <class... Riders, class... Ts>
TensorList<sizeof...(Ts) + sizeof...(Riders)> split(int64_t n, std::tuple<Riders*...> riders,
                                                    std::vector<Ts>&... arrays) {
  constexpr int64_t kTensors = 16;
  TensorList<sizeof...(Ts) + sizeof...(Riders)> list;
  for (int64_t i = 0; i < kTensors; ++i) {
    const int64_t begin = n * i / kTensors;
    const auto add = [&](auto*... rider) {
      list.flat.push_back({{arrays.data() + begin..., rider...}, n * (i + 1) / kTensors - begin});
    };
    std::apply(add, riders);
  }
  list.finish();
  return list;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t n = argc > 1 ? std::atoll(argv[1]) : 30'000'000;
  const int num_threads = argc > 2 ? std::atoi(argv[2]) : 1;
  if (n < 1 || num_threads < 1) {
    std::fprintf(stderr, "usage: bench_kernels [elements [threads]]\n");
    return 2;
  }
  constexpr int kRounds = 11;
  std::vector<float> a(n, 1.0f), b(n, 0.5f), c(n, 0.25f), d(n, 0.125f), e(n, 0.0f);
  const nestopt::ComplexSgdScalars<float> sgd{1e-6f, 0.8f, 0.4f, 1.0f, 0.0f, 1.0f, false};
  const nestopt::NeumannScalars<float> neumann{1e-6f, 0.0f};
  nestopt::ComplexAdamScalars<float> adam = nestopt::complex_adam_scalars<float>(
      {.lr = 1e-6, .beta1 = 0.8, .beta1_imag = 0.4, .beta2 = 0.999, .eps = 1e-8}, 10);
  const auto adam_list = split(n, std::tuple(&adam), a, b, c, d, e);
  const auto complex_list = split(n, std::tuple(), a, b, c, d);
  const auto real_list = split(n, std::tuple(), a, b, c);

  std::vector<Case> cases;
  const auto chunks_of = [&](auto& list, auto body) {
    return [&list, body, num_threads] { in_threads(list.chunks(), num_threads, body); };
  };
  std::vector<double> norms(real_list.chunks());
  cases.push_back({"complex_adam, complex momentum", 36.0 * n, chunks_of(adam_list, [&](int64_t first, int64_t last) {
                     nestopt::cpu::complex_adam_chunks<true, false, float>(adam_list, first, last);
                   })});
  cases.push_back({"complex_sgd, complex momentum", 28.0 * n, chunks_of(complex_list, [&](int64_t first, int64_t last) {
                     nestopt::cpu::complex_sgd_chunks<float>(complex_list, first, last, sgd);
                   })});
  cases.push_back({"complex_sgd, real momentum", 20.0 * n, chunks_of(real_list, [&](int64_t first, int64_t last) {
                     nestopt::cpu::complex_sgd_chunks<float>(real_list, first, last, sgd);
                   })});
  cases.push_back({"neumann", 20.0 * n, chunks_of(real_list, [&](int64_t first, int64_t last) {
                     nestopt::cpu::neumann_chunks<float, float>(real_list, first, last, neumann, nullptr);
                   })});
  cases.push_back({"neumann with norm", 20.0 * n, chunks_of(real_list, [&](int64_t first, int64_t last) {
                     nestopt::cpu::neumann_chunks<float, float>(real_list, first, last, neumann, norms.data());
                   })});
  cases.push_back({"triad", 12.0 * n, [&] {
                     in_threads(n, num_threads, [&](int64_t first, int64_t last) {
                       triad(last - first, e.data() + first, a.data() + first, b.data() + first);
                     });
                   }});

  // Round by round, so that a slow spell of the machine hits all; the first is a warm-up.
  for (int round = 0; round <= kRounds; ++round) {
    for (Case& one : cases) {
      const auto start = std::chrono::steady_clock::now();
      one.run();
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      if (round > 0) one.seconds.push_back(time.count());
    }
  }
  const double triad_rate = cases.back().bytes / cases.back().median();
  std::printf("%lld elements of float32, %d thread(s), %s, medians of %d\n", static_cast<long long>(n), num_threads,
              nestopt::cpu::simd_level(), kRounds);
  std::printf("%-32s %10s %8s %22s\n", "", "ms", "GB/s", "time / triad's, per byte");
  for (Case& one : cases) {
    const double rate = one.bytes / one.median();
    std::printf("%-32s %10.2f %8.1f %22.2f\n", one.name.c_str(), one.median() * 1e3, rate * 1e-9, triad_rate / rate);
  }
}
