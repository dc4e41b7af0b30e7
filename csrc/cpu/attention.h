// Paged attention on the CPU: entry points that bind/ calls. They check nothing that the host can see in
// shapes; lengths and block ids were judged by check_sequences, whose verdicts they obey.
#pragma once
#include <string>

#include "common/params.h"

namespace tokenstep::cpu {

// Judges every sequence as the device would: lengths, block ids where blocks are needed. `attends`: all keys
// in the window are needed, otherwise only the blocks of new rows. Writes verdicts to `status` [R] and
// returns the first bad sequence, or -1; `why` then says what was wrong with it.
int check_sequences(const PagedBatch& batch, bool attends, int32_t window, int32_t* status, std::string& why);

// `status` [R] are the verdicts; sequences with a bad one are left alone (append) or give zeros and lse -inf
// (attention).
void append_kv(const PagedBatch& batch, const int32_t* status);
void paged_attention(const AttentionParams& params,
                     const int32_t* status);  // appends first if there are new rows
void merge_attention(const MergeParams& params);

}  // namespace tokenstep::cpu
