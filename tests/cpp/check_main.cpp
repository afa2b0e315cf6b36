// Runs the tests named on the command line, or all.
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"

int main(int argc, char** argv) {
  int ran = 0;
  int failed = 0;
  for (const check::Test& test : check::tests()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], test.name) == 0;
    if (!wanted) continue;
    ++ran;
    try {
      test.body();
      std::printf("ok      %s\n", test.name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED  %s\n        %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d of %d tests passed\n", ran - failed, ran);
  return failed == 0 && ran > 0 ? 0 : 1;
}
