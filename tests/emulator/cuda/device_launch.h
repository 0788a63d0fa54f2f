// Host side of a kernel launch in the emulator: the kernel has run when launch returns; the stream is ignored.
#pragma once

#include <cstdint>

#include "block.h"
#include "device.h"
#include "report.h"
#include "vocabulary.h"

namespace rwkv {

inline constexpr int kNotSupported = 801;  // cudaErrorNotSupported

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
  if (shared_bytes > emulator::device().most_shared_bytes)
    emulator::fail("a kernel asks for ", shared_bytes, " bytes of shared memory");
  const KernelCall<Params> call{kernel, params};
  emulator::begin_launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes);
  emulator::run_grid({KernelCall<Params>::run_thread, &call, blocks, threads, shared_bytes});
  return 0;
}

template <class Params>
int resident_blocks([[maybe_unused]] void (*kernel)(Params), [[maybe_unused]] int threads, int shared_bytes,
                    int64_t& blocks) {
  const emulator::Device& device = emulator::device();
  blocks = shared_bytes > device.most_shared_bytes ? 0 : int64_t{device.multiprocessors} * device.blocks_each;
  return 0;
}

}  // namespace rwkv
