// The arguments of sampling that are lists: token histories and logit biases, as flat arrays of RowInputs.
#pragma once
#include "bind/arguments.h"
#include "bind/sample_args.h"

namespace tokenstep::bind {

// Prompt and output of one row, as a range of unique ids with counts; llama.cpp's rules count the last
// penalty_last_n of them together, which are left in inputs.window_tokens. Returns the number of output
// tokens.
int64_t read_history(const Label& prompt, nb::handle prompt_tokens, const Label& output,
                     nb::handle output_tokens, Semantics semantics, int vocab_size, RowInputs& inputs,
                     size_t row);

// Those of all rows, one sequence a row or None.
void read_histories(const char* op, const RowArguments& arguments, int vocab_size, RowInputs& inputs);

// One row's dict {id: bias}, or None.
void read_bias(const Label& label, nb::handle source, int vocab_size, RowInputs& inputs, size_t row);

// One dict for all rows, or a list of one dict or None a row.
void read_biases(const char* op, nb::handle source, int vocab_size, RowInputs& inputs);

}  // namespace tokenstep::bind
