// Runs kernels as plain C++: what tests of kernel logic need of the CUDA runtime, for a host compiler.
//
// A block runs at a time, each of its threads as a fibre. Barriers and shuffles are the only points where fibres take
// turns; blocks of a cooperative launch take turns at the barriers of the grid, each with its own shared memory. The
// order is drawn from fibre::seed: warps get priorities at the start of a block and new ones at each barrier, and the
// first that can run does so up to its next barrier. So one warp may be far ahead of the others, which is what a
// missing barrier needs to show itself. Seed 0 is the plain order.
//
// Reported as std::logic_error, since on a device they hang or are undefined: a barrier that some threads of the block,
// or of the grid, do not reach, or reach in another line; a barrier of the grid in a launch that is not cooperative; a
// shuffle with lanes missing. Not covered: data races between barriers on
// real hardware, atomics, speed.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // so that shared_memory() finds it; one block runs at a time
#define __grid_constant__ &             // `const T __grid_constant__ x`: one copy for the whole grid, as on the device

#if !defined(CUDART_VERSION)
#define CUDART_VERSION 13000
#endif

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fibre {

inline unsigned seed = 0;
inline int64_t launches = 0;      // kernels that ran so far
inline unsigned first_block = 0;  // blocks before this one are left out, for grids too large to run whole

constexpr unsigned kWarp = 32;

// The shared memory of all kernels, which is all the thread-local data that a test executable has of its own.
inline std::pair<char*, size_t> shared_memory() {
  std::pair<char*, size_t> found{nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type == PT_TLS && info->dlpi_tls_data)
            *static_cast<std::pair<char*, size_t>*>(found) = {static_cast<char*>(info->dlpi_tls_data), segment.p_memsz};
        }
        return 1;  // the executable comes first, and libraries have data that is not ours
      },
      &found);
  return found;
}

enum class State { kRunnable, kAtGridBarrier, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fibre {
  static constexpr size_t kStackBytes = 64 * 1024;

  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* sanitizer_stack = nullptr;
  State state;
  std::source_location where;  // of the barrier it waits at
  uint64_t slots[2];           // what it shows to its warp; two, so that a shuffle needs one barrier, not two
  unsigned shuffles;
};

class Block {
 public:
  dim3 index, dim, grid;

  Block(dim3 grid, dim3 dim, std::function<void()> kernel, std::mt19937& random)
      : dim(dim), grid(grid), kernel_(std::move(kernel)), random_(random), fibres_(dim.x) {}

  static Block& current() { return *current_; }
  dim3 thread() const { return dim3(running_); }

  // To be called before the first proceed().
  void start(unsigned block) {
    index = dim3(block);
    shared_.assign(shared_memory().second, '\xff');
    for (Fibre& f : fibres_) {
      f.state = State::kRunnable;
      f.shuffles = 0;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = Fibre::kStackBytes;
      f.context.uc_link = nullptr;
      makecontext(&f.context, [] { current_->body(); }, 0);
    }
  }

  // Runs to the end, or to a barrier of the grid; true if it waits there. The next call passes the barrier.
  bool proceed() {
    current_ = this;
    const auto [memory, size] = shared_memory();
    std::copy_n(shared_.data(), size, memory);
    Fibre* const first = fibres_.data();
    Fibre* const last = first + fibres_.size();
    release(first, last, State::kAtGridBarrier);
    do {
      draw_order();
      while (run_a_warp()) {
      }
    } while (pass_block_barrier());
    std::copy_n(memory, size, shared_.data());
    return std::any_of(first, last, [](const Fibre& f) { return f.state == State::kAtGridBarrier; });
  }

  std::source_location where() const { return fibres_[0].where; }

  [[noreturn]] static void fail(const std::string& what, std::source_location where) {
    throw std::logic_error(what + " at " + where.file_name() + ":" + std::to_string(where.line()));
  }

  void wait(State barrier, std::source_location where) {
    Fibre& f = fibres_[running_];
    f.state = barrier;
    f.where = where;
    leave(f);
  }

  template <class T>
  T shuffle(unsigned mask, T value, unsigned source, std::source_location where) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    const unsigned warp = running_ / kWarp * kWarp;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const bool live = warp + lane < dim.x && fibres_[warp + lane].state != State::kDone;
      if (live != bool(mask >> lane & 1)) fail("shuffle whose mask is not the lanes that are there", where);
    }
    Fibre& f = fibres_[running_];
    const unsigned slot = f.shuffles++ % 2;
    std::memcpy(&f.slots[slot], &value, sizeof value);
    wait(State::kAtWarpBarrier, where);
    std::memcpy(&value, &fibres_[warp + source].slots[slot], sizeof value);
    return value;
  }

 private:
  static inline Block* current_ = nullptr;

  std::function<void()> kernel_;
  std::mt19937& random_;
  std::vector<Fibre> fibres_;
  std::vector<char> shared_;             // while the block does not run
  std::vector<unsigned> warps_, lanes_;  // orders to run in
  unsigned running_ = 0;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  void* sanitizer_stack_ = nullptr;
  std::exception_ptr error_;

  void body() {
    entered();
    try {
      kernel_();
    } catch (...) {
      error_ = std::current_exception();
    }
    fibres_[running_].state = State::kDone;
    leave(fibres_[running_]);
  }

  // Switches of stacks, announced to AddressSanitizer.
  void enter(Fibre& f) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&sanitizer_stack_, f.stack.get(), Fibre::kStackBytes);
#endif
    swapcontext(&scheduler_, &f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(sanitizer_stack_, nullptr, nullptr);
#endif
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
  void leave(Fibre& f) {
#if defined(__SANITIZE_ADDRESS__)
    const bool done = f.state == State::kDone;
    __sanitizer_start_switch_fiber(done ? nullptr : &f.sanitizer_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
    swapcontext(&f.context, &scheduler_);
    entered();
  }
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    Fibre& f = fibres_[running_];
    __sanitizer_finish_switch_fiber(f.sanitizer_stack, &scheduler_stack_, &scheduler_stack_bytes_);
    f.sanitizer_stack = nullptr;
#endif
  }

  void draw_order() {
    warps_.resize((dim.x + kWarp - 1) / kWarp);
    lanes_.resize(kWarp);
    std::iota(warps_.begin(), warps_.end(), 0u);
    std::iota(lanes_.begin(), lanes_.end(), 0u);
    if (seed == 0) return;
    std::shuffle(warps_.begin(), warps_.end(), random_);
    std::shuffle(lanes_.begin(), lanes_.end(), random_);
  }

  // Runs the first warp that can to its next barrier. False when none can.
  bool run_a_warp() {
    for (unsigned warp : warps_) {
      bool ran = false;
      for (unsigned lane : lanes_) {
        const unsigned t = warp * kWarp + lane;
        if (t >= dim.x || fibres_[t].state != State::kRunnable) continue;
        running_ = t;
        enter(fibres_[t]);
        ran = true;
      }
      if (!ran) continue;
      Fibre* const first = &fibres_[warp * kWarp];
      release(first, first + std::min(kWarp, dim.x - warp * kWarp), State::kAtWarpBarrier);
      return true;
    }
    return false;
  }

  // False when all threads are done, or wait for the other blocks.
  bool pass_block_barrier() {
    Fibre* const first = fibres_.data();
    Fibre* const last = first + fibres_.size();
    for (const State end : {State::kDone, State::kAtGridBarrier}) {
      if (std::all_of(first, last, [=](const Fibre& f) { return f.state == end; })) return false;
    }
    if (release(first, last, State::kAtBlockBarrier)) return true;
    fail("barrier that some threads do not reach,",
         std::find_if(first, last, [](const Fibre& f) { return f.state != State::kDone; })->where);
  }

  // Lets fibres go on that all wait at this barrier. Lanes that are done do not hold up a warp, but threads do a block.
  bool release(Fibre* first, Fibre* last, State barrier) {
    Fibre* const live = std::find_if(first, last, [](const Fibre& f) { return f.state != State::kDone; });
    for (Fibre* f = first; f != last; ++f) {
      if (f->state == State::kDone && barrier == State::kAtWarpBarrier) continue;
      if (f->state != barrier) return false;
      if (f->where.line() != live->where.line()) fail("barrier that some threads reach in another line,", f->where);
    }
    if (live == last) return false;
    for (Fibre* f = first; f != last; ++f) {
      if (f->state == barrier) f->state = State::kRunnable;
    }
    return true;
  }
};

inline void run(dim3 grid, dim3 block, std::function<void()> kernel) {
  std::mt19937 random(seed + 1000003u * static_cast<unsigned>(launches));
  std::vector<unsigned> order(grid.x - std::min(grid.x, first_block));
  std::iota(order.begin(), order.end(), first_block);
  if (seed != 0) std::shuffle(order.begin(), order.end(), random);
  Block runner(grid, block, std::move(kernel), random);
  for (unsigned b : order) {
    runner.start(b);
    if (runner.proceed()) Block::fail("barrier of a grid that was not launched as one,", runner.where());
  }
  ++launches;
}

// All blocks together, from barrier to barrier of the grid.
inline void run_together(dim3 grid, dim3 block, std::function<void()> kernel) {
  std::mt19937 random(seed + 1000003u * static_cast<unsigned>(launches));
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned b = 0; b < grid.x; ++b) {
    blocks.push_back(std::make_unique<Block>(grid, block, kernel, random));
    blocks.back()->start(b);
  }
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  for (bool waiting = true; waiting;) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    std::vector<const Block*> waits;
    for (unsigned b : order) {
      if (blocks[b]->proceed()) waits.push_back(blocks[b].get());
    }
    waiting = !waits.empty();
    if (waiting && waits.size() < blocks.size())
      Block::fail("barrier of the grid that some blocks do not reach,", waits[0]->where());
    for (const Block* b : waits) {
      if (b->where().line() != waits[0]->where().line())
        Block::fail("barrier of the grid that some blocks reach in another line,", b->where());
    }
  }
  ++launches;
}

}  // namespace fibre

#define threadIdx (::fibre::Block::current().thread())
#define blockIdx (::fibre::Block::current().index)
#define blockDim (::fibre::Block::current().dim)
#define gridDim (::fibre::Block::current().grid)

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  fibre::Block::current().wait(fibre::State::kAtBlockBarrier, where);
}

inline void __syncwarp(unsigned = ~0u, std::source_location where = std::source_location::current()) {
  fibre::Block::current().wait(fibre::State::kAtWarpBarrier, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned step, std::source_location where = std::source_location::current()) {
  const unsigned lane = threadIdx.x % fibre::kWarp;
  return fibre::Block::current().shuffle(mask, x, lane + step < fibre::kWarp ? lane + step : lane, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, unsigned bits, std::source_location where = std::source_location::current()) {
  return fibre::Block::current().shuffle(mask, x, threadIdx.x % fibre::kWarp ^ bits, where);
}

namespace cooperative_groups {

struct grid_group {
  void sync(std::source_location where = std::source_location::current()) const {
    fibre::Block::current().wait(fibre::State::kAtGridBarrier, where);
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

namespace fibre {

// With the runtime's limits: of a grid, of a block and of the bytes of arguments.
template <class... Parameters>
cudaError_t launch(decltype(run)* in, void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments) {
  constexpr size_t kArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
  if ((sizeof(std::remove_reference_t<Parameters>) + ... + 0) > kArgumentBytes) return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.x > INT32_MAX || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
  if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
  [&]<size_t... i>(std::index_sequence<i...>) {
    in(grid, block, [&] { kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[i])...); });
  }(std::index_sequence_for<Parameters...>{});
  return cudaSuccess;
}

}  // namespace fibre

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  return fibre::launch(fibre::run, kernel, grid, block, arguments);
}

// Refuses more blocks than there is memory for here, as a device does that has not enough multiprocessors.
template <class... Parameters>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t,
                                        cudaStream_t) {
  constexpr unsigned kMultiprocessors = 16;
  if (grid.x > kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  return fibre::launch(fibre::run_together, kernel, grid, block, arguments);
}
