// Asynchronous copies from global to shared memory, as late as the hardware may make them: nothing arrives before the
// wait that covers it, and until then the target holds poison.
#pragma once

#include "report.h"

namespace emulator {

struct Copy {
  void* shared;
  const void* global;
  bool wanted;  // false: zeros
  Location where;
};

void begin_copies(int threads);

// Of the running thread.
void issue_copy(const Copy& copy);
void commit_group();
bool next_arrived(int pending_groups, Copy& copy);  // one more copy of all but the newest pending_groups groups
void check_no_copies_left();

}  // namespace emulator
