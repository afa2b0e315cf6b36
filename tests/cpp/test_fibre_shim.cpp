// The shim must show the faults it is there for: a test of a kernel proves nothing otherwise.
#include "fibre_shim.h"

#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace {

cudaError_t launch(void (*kernel)(int*), unsigned blocks, unsigned threads, int* data) {
  void* arguments[] = {&data};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, 0, nullptr);
}

constexpr int kSeeds = 20;
constexpr unsigned kBlock = 128;

// In how many of kSeeds orders body() is true.
int count_seeds(const std::function<bool()>& body) {
  int count = 0;
  for (fibre::seed = 1; fibre::seed <= kSeeds; ++fibre::seed) count += body();
  fibre::seed = 0;
  return count;
}

std::string error_of(void (*kernel)(int*), unsigned threads) {
  int unused = 0;
  try {
    launch(kernel, 1, threads, &unused);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "none";
}

// Each thread hands its number to the one opposite, twice through the same shared memory.
template <bool kFirstBarrier, bool kSecondBarrier>
void exchange_kernel(int* out) {
  __shared__ int shared[kBlock];
  const unsigned t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    shared[t] = 1 + static_cast<int>(t) + 1000 * round + 10000 * static_cast<int>(blockIdx.x);
    if (kFirstBarrier) __syncthreads();
    out[(blockIdx.x * 2 + round) * kBlock + t] = shared[kBlock - 1 - t];
    if (kSecondBarrier) __syncthreads();
  }
}

bool exchange_is_right(void (*kernel)(int*)) {
  constexpr int kBlocks = 3;
  std::vector<int> out(2 * kBlocks * kBlock, -1);
  launch(kernel, kBlocks, kBlock, out.data());
  for (int block = 0; block < kBlocks; ++block) {
    for (int round = 0; round < 2; ++round) {
      for (int t = 0; t < static_cast<int>(kBlock); ++t) {
        const int want = static_cast<int>(kBlock) - t + 1000 * round + 10000 * block;
        if (out[(block * 2 + round) * kBlock + t] != want) return false;
      }
    }
  }
  return true;
}

TEST(barriers_order_shared_memory) {
  CHECK(count_seeds([] { return exchange_is_right(exchange_kernel<true, true>); }) == kSeeds);
}

TEST(a_missing_barrier_shows) {
  CHECK(count_seeds([] { return exchange_is_right(exchange_kernel<false, true>); }) == 0,
        "between writing and reading");
  CHECK(count_seeds([] { return exchange_is_right(exchange_kernel<true, false>); }) <= kSeeds / 2,
        "before writing again");
}

TEST(shared_memory_keeps_nothing_from_block_to_block) {
  const auto kernel = [](int* out) {
    __shared__ int shared[2];
    out[blockIdx.x] = shared[0];
    shared[0] = 1;
  };
  std::vector<int> out(3);
  launch(kernel, 3, 1, out.data());
  CHECK(out == std::vector<int>(3, -1), out[0], out[1], out[2]);
}

TEST(shuffles_move_values_between_lanes) {
  const auto kernel = [](int* out) {
    int x = static_cast<int>(threadIdx.x);
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    out[threadIdx.x] = x + 100000 * __shfl_down_sync(~0u, static_cast<int>(threadIdx.x), 1);
  };
  CHECK(count_seeds([&] {
          std::vector<int> out(64);
          launch(kernel, 1, 64, out.data());
          for (int t = 0; t < 64; ++t) {
            const int sum = t < 32 ? 496 : 496 + 32 * 32;
            const int next = t % 32 == 31 ? t : t + 1;
            if (out[t] != sum + 100000 * next) return false;
          }
          return true;
        }) == kSeeds);
}

TEST(every_thread_of_every_block_runs_once) {
  const auto kernel = [](int* out) { ++out[blockIdx.x * blockDim.x + threadIdx.x]; };
  std::vector<int> out(7 * 33);
  CHECK(launch(kernel, 7, 33, out.data()) == cudaSuccess);
  CHECK(out == std::vector<int>(7 * 33, 1));
}

TEST(orders_differ_between_seeds) {
  static std::vector<unsigned> order;
  std::set<std::vector<unsigned>> seen;
  count_seeds([&] {
    order.clear();
    int unused = 0;
    launch([](int*) { order.push_back(threadIdx.x); }, 1, 64, &unused);
    return seen.insert(order).second;
  });
  CHECK(seen.size() == kSeeds, seen.size());
}

TEST(divergent_barriers_are_reported) {
  const auto half = [](int*) {
    if (threadIdx.x < 16) __syncthreads();
  };
  CHECK(error_of(half, 64).find("do not reach") != std::string::npos, error_of(half, 64));
  const auto two_lines = [](int*) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  };
  CHECK(error_of(two_lines, 64).find("another line") != std::string::npos, error_of(two_lines, 64));
  const auto part_of_a_warp = [](int*) {
    if (threadIdx.x < 16) __shfl_down_sync(~0u, 1, 1);
    __syncthreads();
  };
  CHECK(error_of(part_of_a_warp, 64).find("do not reach") != std::string::npos, error_of(part_of_a_warp, 64));
  const auto short_warp = [](int*) { __shfl_down_sync(~0u, 1, 1); };
  CHECK(error_of(short_warp, 48).find("mask") != std::string::npos, error_of(short_warp, 48));
}

cudaError_t launch_together(void (*kernel)(int*), unsigned blocks, unsigned threads, int* data) {
  void* arguments[] = {&data};
  return cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, 0, nullptr);
}

// Each block adds up what all blocks wrote before, in a few rounds, and keeps its own number in shared memory
// meanwhile.
template <bool kBarrier>
void rounds_kernel(int* out) {
  __shared__ int own;
  if (threadIdx.x == 0) own = 1 + static_cast<int>(blockIdx.x);
  __syncthreads();
  for (int round = 0; round < 3; ++round) {
    int* const to = out + round * gridDim.x;
    int sum = own;
    for (unsigned b = 0; round > 0 && b < gridDim.x; ++b) sum += to[static_cast<int>(b) - static_cast<int>(gridDim.x)];
    if (threadIdx.x == 0) to[blockIdx.x] = sum;
    if (kBarrier) cooperative_groups::this_grid().sync();
  }
}

bool rounds_are_right(void (*kernel)(int*)) {
  std::vector<int> out(3 * 4);
  CHECK(launch_together(kernel, 4, 64, out.data()) == cudaSuccess);
  return out == std::vector<int>({1, 2, 3, 4, 11, 12, 13, 14, 51, 52, 53, 54});
}

TEST(barriers_of_the_grid_order_blocks_that_keep_their_shared_memory) {
  CHECK(count_seeds([] { return rounds_are_right(rounds_kernel<true>); }) == kSeeds);
  CHECK(count_seeds([] { return rounds_are_right(rounds_kernel<false>); }) == 0);
}

TEST(faulty_barriers_of_the_grid_are_reported) {
  const auto error = [](void (*kernel)(int*), bool together) -> std::string {
    int unused = 0;
    try {
      together ? launch_together(kernel, 3, 64, &unused) : launch(kernel, 3, 64, &unused);
    } catch (const std::logic_error& error) {
      return error.what();
    }
    return "none";
  };
  const auto all = [](int*) { cooperative_groups::this_grid().sync(); };
  const auto one_block = [](int*) {
    if (blockIdx.x == 1) cooperative_groups::this_grid().sync();
  };
  const auto half_a_block = [](int*) {
    if (threadIdx.x < 32) cooperative_groups::this_grid().sync();
  };
  const auto two_lines = [](int*) {
    if (blockIdx.x == 1) {
      cooperative_groups::this_grid().sync();
    } else {
      cooperative_groups::this_grid().sync();
    }
  };
  CHECK(error(all, true) == "none");
  CHECK(error(all, false).find("not launched as one") != std::string::npos, error(all, false));
  CHECK(error(one_block, true).find("some blocks do not reach") != std::string::npos, error(one_block, true));
  CHECK(error(half_a_block, true).find("some threads do not reach") != std::string::npos, error(half_a_block, true));
  CHECK(error(two_lines, true).find("in another line") != std::string::npos, error(two_lines, true));
}

TEST(launches_that_a_device_refuses_are_refused) {
  const auto kernel = [](int*) {};
  int unused = 0;
  CHECK(launch(kernel, 0, 32, &unused) == cudaErrorInvalidConfiguration);
  CHECK(launch(kernel, 1, 1025, &unused) == cudaErrorInvalidConfiguration);
  CHECK(launch_together(kernel, 0, 32, &unused) == cudaErrorInvalidConfiguration);
  CHECK(launch_together(kernel, 1000, 32, &unused) == cudaErrorCooperativeLaunchTooLarge);
  struct Large {
    char bytes[32768];
  };
  Large large{};
  void* arguments[] = {&large};
  void (*takes_large)(const Large&) = [](const Large&) {};
  CHECK(cudaLaunchKernel(takes_large, dim3(1), dim3(1), arguments, 0, nullptr) == cudaErrorInvalidValue);
}

}  // namespace
