// What the kernel bodies include: all of it stands before the target pragma, so that no standard inline function is
// compiled for a wider instruction set than the processor may have.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "cpu/wkv_kernels.h"
