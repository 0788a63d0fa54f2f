// Errors of a kernel under emulation: one message on stderr, then the process ends with kErrorExit.
#pragma once

#include <source_location>
#include <sstream>
#include <string>

namespace emulator {

using Location = std::source_location;

inline constexpr int kErrorExit = 70;

std::string text_of(const Location& where);  // file:line

[[noreturn]] void stop(const std::string& message);

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  stop(message.str());
}

}  // namespace emulator
