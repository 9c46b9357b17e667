// token_pack's arithmetic, one word or one column at a time: the work of one thread, on the host and on the device.
#pragma once

#include <cstdint>

#include "device.h"

namespace llava_fast::pack {

// The three tables of decoder rows, and the placement: source 0 text, 1 visual, 2 constant, else padding.
template <class Word>
struct Tables {
  const int32_t *source, *row;
  const Word *embedding, *visual, *constant;
  int64_t words;  // in a row
};

// Word `word` of decoder row `at`.
template <class Word>
LLAVA_FAST_DEVICE Word packed_word(const Tables<Word>& tables, int64_t at, int64_t word) {
  const int32_t source = tables.source[at];
  const Word* table = source == 0 ? tables.embedding : source == 1 ? tables.visual : tables.constant;
  return source < 0 || source > 2 ? Word{} : table[tables.row[at] * tables.words + word];
}

// Word `word` of the row at place[at], zero where that is negative.
template <class Word>
LLAVA_FAST_DEVICE Word taken_word(const Word* rows, const int32_t* place, int64_t words, int64_t at, int64_t word) {
  return place[at] < 0 ? Word{} : rows[place[at] * words + word];
}

// Rows of a table of gradients in the order in which they are to be summed: segment s is order[first[s] .. first[s+1]).
struct Segments {
  const int32_t *order, *first;
};

// One column of one part of a segment, summed in order in float (double for double).
template <class Value, class Wide>
LLAVA_FAST_DEVICE Wide summed_column(const Value* rows, const Segments& segments, int64_t width, int64_t segment,
                                     int64_t part, int64_t parts, int64_t column) {
  const int64_t begin = segments.first[segment], end = segments.first[segment + 1];
  const int64_t share = (end - begin + parts - 1) / parts;
  const int64_t first = begin + part * share, last = first + share < end ? first + share : end;
  Wide total = 0;
  for (int64_t use = first; use < last; ++use) total += static_cast<Wide>(rows[segments.order[use] * width + column]);
  return total;
}

}  // namespace llava_fast::pack
