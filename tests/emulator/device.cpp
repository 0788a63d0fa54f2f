#include "device.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>

namespace emulator {
namespace {

std::vector<Launch> all_launches;
int64_t unattributed = 0;
int64_t* bytes_read = &unattributed;
int64_t* bytes_written = &unattributed;

std::string name_of(const void* function) {
  Dl_info info;
  if (!dladdr(const_cast<void*>(function), &info) || !info.dli_sname) return "unnamed kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = readable ? readable : info.dli_sname;
  std::free(readable);
  return name;
}

}  // namespace

Device& device() {
  static Device the_device;
  return the_device;
}

std::vector<Launch>& launches() { return all_launches; }

void begin_launch(const void* function, int64_t blocks, int threads, int shared_bytes) {
  all_launches.push_back({name_of(function), blocks, threads, shared_bytes, 0, 0});
  bytes_read = &all_launches.back().bytes_read;
  bytes_written = &all_launches.back().bytes_written;
}

void count_read(int64_t bytes) { *bytes_read += bytes; }
void count_written(int64_t bytes) { *bytes_written += bytes; }

}  // namespace emulator
