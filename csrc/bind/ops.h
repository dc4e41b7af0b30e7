// One registration function per op file of this folder.
#pragma once
#include <nanobind/nanobind.h>

namespace tokenstep::bind {

// An argument that may be any object, None included: the op's own checks say what is wrong with it.
constexpr auto any_object(const char* name) { return nanobind::arg(name).none(); }

void register_sample(nanobind::module_& m);     // sample, apply_logits, Sampler
void register_attention(nanobind::module_& m);  // paged_attention, append_kv, merge_attention
void register_testing(
    nanobind::module_& m);  // submodule `testing`: numerics and bindings, as the tests call them

}  // namespace tokenstep::bind
