// The emulator's number formats on data from stdin: int64 counts of halves and floats, the halves, the floats.
// Writes every half as a float and every float as a half. The argument says which kind of half.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/device_primitives.h"

template <class T>
void convert(const std::vector<uint16_t>& halves, const std::vector<float>& floats) {
  for (const uint16_t half : halves) {
    const float2 pair = rwkv::unpack<T>(half | 0x3c000000u);
    std::fwrite(&pair.x, sizeof(float), 1, stdout);
  }
  for (const float x : floats) {
    const uint32_t pair = rwkv::pack<T>(1.0f, x);
    const uint16_t half = static_cast<uint16_t>(pair >> 16);
    std::fwrite(&half, sizeof(half), 1, stdout);
  }
}

int main(int count, char** words) {
  int64_t sizes[2];
  if (count != 2 || std::fread(sizes, sizeof(int64_t), 2, stdin) != 2) return 2;
  std::vector<uint16_t> halves(sizes[0]);
  std::vector<float> floats(sizes[1]);
  if (std::fread(halves.data(), 2, halves.size(), stdin) != halves.size()) return 2;
  if (std::fread(floats.data(), 4, floats.size(), stdin) != floats.size()) return 2;
  if (std::strcmp(words[1], "bfloat16") == 0)
    convert<rwkv::BFloat16>(halves, floats);
  else
    convert<rwkv::Float16>(halves, floats);
}
