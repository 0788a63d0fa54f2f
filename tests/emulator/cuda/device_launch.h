// Host side of a kernel launch in the emulator: the kernel has run when launch returns; the stream is ignored.
#pragma once

#include <cstdint>

#include "block.h"
#include "device.h"
#include "report.h"
#include "vocabulary.h"

namespace rwkv {

inline constexpr int kNotSupported = 801;  // cudaErrorNotSupported
inline constexpr int kMostSharedBytes = 227 * 1024;  // of a block on sm_90; 163 KiB on sm_80

template <class Params>
struct KernelCall {
  void (*kernel)(Params);
  const Params& params;

  static void run_thread(const void* closure) {
    const auto& call = *static_cast<const KernelCall*>(closure);
    call.kernel(call.params);
  }
};

template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, const Params& params,
           [[maybe_unused]] void* stream) {
  if (blocks == 0) return 0;
  if (shared_bytes > kMostSharedBytes) emulator::fail("a kernel asks for ", shared_bytes, " bytes of shared memory");
  const KernelCall<Params> call{kernel, params};
  emulator::begin_launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes);
  emulator::run_grid({KernelCall<Params>::run_thread, &call, blocks, threads, shared_bytes});
  return 0;
}

template <class Params>
int resident_blocks([[maybe_unused]] void (*kernel)(Params), [[maybe_unused]] int threads,
                    [[maybe_unused]] int shared_bytes, int64_t& blocks) {
  blocks = int64_t{emulator::device().multiprocessors} * emulator::device().blocks_each;
  return 0;
}

}  // namespace rwkv
