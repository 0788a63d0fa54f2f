// What the bodies of the decode kernels include: all of it stands before the target pragma (see kernel_includes.h).
#pragma once

#include <algorithm>

#include "cpu/decode_kernels.h"
#include "cpu/kernel_includes.h"
