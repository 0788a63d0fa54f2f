// What the layer's kernel bodies include, before the target pragma for the reason that kernel_includes.h gives.
#pragma once

#include <iterator>
#include <limits>

#include "cpu/kernel_includes.h"
#include "cpu/layer_kernels.h"
