#include "device.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <unordered_set>

#include "unseen.h"

namespace emulator {
namespace {

std::vector<Launch> all_launches;
std::unordered_set<uintptr_t> sectors_read;  // of the last launch
constexpr uintptr_t kSectorBytes = 32;

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
  all_launches.push_back({name_of(function), blocks, threads, shared_bytes});
  sectors_read.clear();
}

void count_read(const void* address, int64_t bytes) {
  const Unseen unseen;
  Launch& launch = all_launches.back();
  launch.bytes_read += bytes;
  if (sectors_read.insert(reinterpret_cast<uintptr_t>(address) / kSectorBytes).second)
    launch.distinct_bytes_read += kSectorBytes;
}

void count_written(int64_t bytes) { all_launches.back().bytes_written += bytes; }

}  // namespace emulator
