#include "bind/ops.h"
namespace tokenstep::bind {
void register_attention(nanobind::module_&) {}
}
