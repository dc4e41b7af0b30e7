#include "bind/sample_outputs.h"
namespace tokenstep::bind {
void register_sampler(nb::module_&) {}
}  // namespace tokenstep::bind
