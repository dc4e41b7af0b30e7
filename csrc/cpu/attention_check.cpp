// The device's checks of data (lengths and block ids), done by the host where the data is on the host.
#include <algorithm>
#include <cstdint>

#include "common/attention_plan.h"
#include "common/check.h"
#include "cpu/attention.h"

namespace tokenstep::cpu {
namespace {

struct Sequence {
  int index;
  int64_t length, num_queries;
};

std::string length_fault(const PagedBatch& batch, const Sequence& s) {
  const auto fault = [&](const std::string& expected) {
    return format("seq_lens[%d] = %lld, expected ", s.index, static_cast<long long>(s.length)) + expected;
  };
  const long long capacity = static_cast<long long>(batch.max_blocks) * batch.block_size;
  if (s.length < 0 || s.length > capacity)
    return fault(format("0 ≤ length ≤ %lld (%d blocks of %d in its row of block_table)", capacity,
                        batch.max_blocks, batch.block_size));
  if (s.length > 0 && s.length < s.num_queries)
    return fault(format("at least its %lld new tokens, or 0", static_cast<long long>(s.num_queries)));
  if (batch.rope.cos && s.num_queries > 0 && s.length > batch.rope.max_position)
    return fault(format("at most %d (the positions of rope)", batch.rope.max_position));
  return {};
}

std::string block_fault(const PagedBatch& batch, const Sequence& s, int64_t first_position) {
  const int32_t* row = batch.block_table + s.index * batch.block_table_stride;
  const int64_t begin = first_position / batch.block_size, end = (s.length - 1) / batch.block_size + 1;
  const auto bad = [&](int32_t id) {
    return static_cast<uint32_t>(id) >= static_cast<uint32_t>(batch.num_blocks);
  };
  bool any_bad = false;
  for (int64_t i = begin; i < end; ++i) any_bad |= bad(row[i]);
  if (!any_bad) return {};
  const auto column = static_cast<long long>(std::find_if(row + begin, row + end, bad) - row);
  return format("block_table[%d, %lld] = %d, expected 0 ≤ id < %d (blocks of the cache)", s.index, column,
                row[column], batch.num_blocks);
}

}  // namespace

int check_sequences(const PagedBatch& batch, bool attends, int32_t window, int32_t* status,
                    std::string& why) {
  int first_bad = -1;
  for (int r = 0; r < batch.num_sequences; ++r) {
    const int64_t queries = batch.query_start ? batch.query_start[r + 1] - batch.query_start[r] : 1;
    const Sequence sequence{r, batch.seq_lens[r], queries};
    auto verdict = AttentionStatus::kOk;
    std::string fault = length_fault(batch, sequence);
    if (!fault.empty()) {
      verdict = AttentionStatus::kBadLength;
    } else if (sequence.length > 0 && queries > 0) {
      const int64_t first_query = sequence.length - queries;
      fault = block_fault(batch, sequence, attends ? first_key(first_query, window) : first_query);
      if (!fault.empty()) verdict = AttentionStatus::kBadBlock;
    }
    status[r] = static_cast<int32_t>(verdict);
    if (first_bad < 0 && verdict != AttentionStatus::kOk) {
      first_bad = r;
      why = std::move(fault);
    }
  }
  return first_bad;
}

}  // namespace tokenstep::cpu
