// A block's shared memory. Every buffer lies apart from the others, between guards that are checked when the block ends
// (AddressSanitizer checks every access to them), and starts as 0xff bytes, which are NaN in every float format.
#pragma once

#include <cstdint>

#include "report.h"

namespace emulator {

inline constexpr unsigned char kPoison = 0xff;

void begin_shared_memory(int shared_bytes);
void end_shared_memory();

// The buffer at this offset: the same bytes in every thread, within shared_bytes, apart from all others.
void* shared_buffer(int byte_offset, int64_t bytes, const Location& where);

bool is_shared(const void* address);

}  // namespace emulator
