// The arguments that sample, apply_logits and Sampler share: Python numbers, lists and arrays become
// RowParams and the flat lists behind them. Everything is checked here, before a kernel runs; errors name the
// argument and the row.
#pragma once
#include <vector>

#include "bind/tensor.h"
#include "common/params.h"

namespace tokenstep::bind {

// The Python objects, borrowed. Each is one value for all rows or one per row; token sequences and dicts
// likewise.
struct RowArguments {
  nb::handle temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  nb::handle prompt_tokens, output_tokens, logit_bias;
  nb::handle seed, position, substream;
};

// What SampleParams points to, for the rows of one call.
struct RowInputs {
  std::vector<RowParams> rows;
  std::vector<int32_t> history_ids;  // counts lie beside the ids
  std::vector<uint32_t> history_counts;
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
};

RowInputs read_rows(const char* op, const RowArguments& arguments, int num_rows, int vocab_size);

// One row, as Sampler.admit takes it: plain values, one sequence of ids, one dict. Its position is not read:
// it is the number of output tokens.
RowInputs read_one_row(const char* op, const RowArguments& arguments, int vocab_size);

Tensor read_logits(const char* op, nb::handle logits);  // [B, V] on the CPU
void read_bitmask(const char* op, nb::handle bitmask, SampleParams& params);
int read_num_logprobs(const char* op, nb::handle logprobs);  // -1: None
LogprobsMode read_logprobs_mode(const char* op, nb::handle mode);

// Raises ValueError naming the first row that could not be sampled; nothing if there is none.
void raise_for_status(const char* op, const int32_t* status, int num_rows);

}  // namespace tokenstep::bind
