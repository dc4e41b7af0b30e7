// One registration function per op file of this folder.
#pragma once
#include <nanobind/nanobind.h>

namespace tokenstep::bind {

// An argument that may be any object, None included: the op's own checks say what is wrong with it.
constexpr auto any_object(const char* name) { return nanobind::arg(name).none(); }

void translate_errors();  // TypeError of common/check.h is Python's, in every module

void register_sample(nanobind::module_& m);       // sample, apply_logits, Sampler
void register_attention(nanobind::module_& m);    // paged_attention, append_kv, merge_attention
void register_linear(nanobind::module_& m);       // PackedMatrix, of the CPU module alone
void register_decoder_ops(nanobind::module_& m);  // rms_norm, gate, soft_cap, of the CPU module alone

// Submodule `testing`: of the CPU module the shared numerics and bindings, as the tests call them; of the
// others how kernels are launched.
void register_testing(nanobind::module_& m);
void register_device_testing(nanobind::module_& m);

}  // namespace tokenstep::bind
