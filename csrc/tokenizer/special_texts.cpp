#include "tokenizer/special_texts.h"

#include <algorithm>
#include <utility>

namespace rwkv {

void SpecialTexts::add(std::string text, uint16_t id) {
  const auto is_shorter = [&](const Special& special) { return special.text.size() < text.size(); };
  const auto place = std::find_if(specials_.begin(), specials_.end(), is_shorter);
  specials_.insert(place, {std::move(text), id});
}

void SpecialTexts::encode(const Encoder& encoder, std::string_view text, IdBuffer& ids) const {
  std::vector<size_t> next(specials_.size());  // where each occurs first, at or behind `start`
  for (size_t i = 0; i < next.size(); ++i) next[i] = text.find(specials_[i].text);
  for (size_t start = 0;;) {
    size_t found = 0, at = std::string_view::npos;
    for (size_t i = 0; i < next.size(); ++i) {
      if (next[i] < start) next[i] = text.find(specials_[i].text, start);
      if (next[i] < at) at = next[found = i];
    }
    if (at > start && start < text.size()) encoder.encode(text.substr(start, at - start), ids);
    if (at == std::string_view::npos) return;
    uint16_t* out = ids.room(1);
    *out = specials_[found].id;
    ids.set_end(out + 1);
    start = at + specials_[found].text.size();
  }
}

}  // namespace rwkv
