// What this binary holds, as rwkv-ext doctor prints it.
#pragma once

namespace rwkv {

const char* cpu_instruction_set();  // what the CPU kernels run with on this machine

}  // namespace rwkv
