#pragma once

#include <cstdint>
#include <thread>
#include <vector>

// Calls body(first, last) on ranges that cover [0, n), each in a thread of its own.
template <class Body>
void in_threads(int64_t n, int num_threads, Body body) {
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([=] { body(n * t / num_threads, n * (t + 1) / num_threads); });
  }
  for (std::thread& thread : threads) thread.join();
}
