#include "report.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>

#include "block.h"

namespace emulator {

std::string text_of(const Location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

void stop(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: %s%s\n", who_runs().c_str(), message.c_str());
  std::fflush(stderr);
  syscall(SYS_exit_group, kErrorExit);  // at once: fibers are in the middle of their work, sanitizers would remark it
  __builtin_unreachable();
}

}  // namespace emulator
