// Which of the compiled instruction sets this process uses: the widest that the processor has, and
// ATEN_CPU_CAPABILITY limits it as it limits torch.
#pragma once

#include <cstdlib>
#include <string>

namespace rwkv {

enum class InstructionSet { kGeneric, kAvx2, kAvx512 };

inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet chosen = [] {
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string wanted = limit ? limit : "avx512";
    const bool narrow =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool wide = narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wanted == "avx512" && wide) return InstructionSet::kAvx512;
    return wanted != "default" && narrow ? InstructionSet::kAvx2 : InstructionSet::kGeneric;
  }();
  return chosen;
#else
  return InstructionSet::kGeneric;
#endif
}

}  // namespace rwkv
