#include "simt/device.h"

#include "simt/machine.h"

namespace tokenstep::simt {

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
dim3 block_dimensions() { return machine.block_dim; }
dim3 grid_dimensions() { return machine.grid_dim; }
void pause() { machine.wait_in_loop(); }

}  // namespace tokenstep::simt
