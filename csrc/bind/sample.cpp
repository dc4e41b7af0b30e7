#include "bind/ops.h"
namespace tokenstep::bind {
void register_sample(nanobind::module_&) {}
}
