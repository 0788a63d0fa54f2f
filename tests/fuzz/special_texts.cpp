// SpecialTexts: against the first place where any of them stands, looked for byte by byte.
#include <utility>

#include "oracle.h"
#include "tokenizer/special_texts.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  const fuzz::Language& language = fuzz::language(input.take());
  std::vector<std::pair<std::string, uint16_t>> allowed;
  rwkv::SpecialTexts special;
  for (size_t count = input.take() % 5; count > 0; --count) {
    std::string text(1 + input.take() % 5, '\0');
    for (char& c : text) c = static_cast<char>(input.take());
    const auto id = static_cast<uint16_t>(60000 + allowed.size());
    special.add(text, id);
    allowed.emplace_back(std::move(text), id);
  }
  const std::string_view text = input.rest();

  std::vector<uint16_t> expected;
  std::string between;
  const auto end_part = [&] {
    for (const uint16_t id : language.encode(between)) expected.push_back(id);
    between.clear();
  };
  for (size_t at = 0; at < text.size();) {
    const std::pair<std::string, uint16_t>* longest = nullptr;
    for (const auto& one : allowed) {
      if (text.compare(at, one.first.size(), one.first) != 0) continue;
      if (longest == nullptr || one.first.size() > longest->first.size()) longest = &one;
    }
    if (longest == nullptr) {
      between += text[at++];
      continue;
    }
    end_part();
    expected.push_back(longest->second);
    at += longest->first.size();
  }
  end_part();

  rwkv::IdBuffer ids;
  special.encode(language.encoder, text, ids);
  REQUIRE(fuzz::to_vector(ids) == expected);
  return 0;
}
