// A test runner: TEST(name) { ... } defines a test, CHECK(condition, what...) ends it with a message when it is false.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... What>
[[noreturn]] void fail(const char* file, int line, const char* condition, const What&... what) {
  std::ostringstream text;
  text.precision(17);
  text << file << ":" << line << ": " << condition << " does not hold";
  ((text << " " << what), ...);
  throw Failure(text.str());
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition, ...)                                                                 \
  do {                                                                                        \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__); \
  } while (false)
