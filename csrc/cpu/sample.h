// The fused sampler on the CPU: logits to tokens in one call (see csrc/common/params.h for what each field
// means).
#pragma once
#include "common/params.h"
#include "cpu/isa.h"

namespace tokenstep::cpu {

void sample(const SampleParams& params);             // steps 0-10
void apply_logits(const ApplyLogitsParams& params);  // steps 0-8

TOKENSTEP_DECLARE_FOR_EACH_ISA(void sample_rows(const SampleParams& params, int num_threads))
TOKENSTEP_DECLARE_FOR_EACH_ISA(void apply_logits_to_rows(const ApplyLogitsParams& params, int num_threads))

}  // namespace tokenstep::cpu
