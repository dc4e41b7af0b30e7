// The output arrays of sample and Sampler.step: (tokens, status, logprobs, ranks, top_tokens, top_logprobs).
#pragma once
#include "bind/tensor.h"
#include "common/params.h"

namespace tokenstep::bind {

// New arrays of the kind of `logits`, entered into params; num_logprobs < 0: the last four are None.
nb::tuple new_outputs(const Tensor& logits, int num_logprobs, SampleParams& params);

// Checks a caller's tuple of arrays and enters it into params. Its top arrays may be wider than num_logprobs.
void use_outputs(const char* op, nb::handle out, const Tensor& logits, int num_logprobs,
                 SampleParams& params);

void register_sampler(nb::module_& m);  // class Sampler

}  // namespace tokenstep::bind
