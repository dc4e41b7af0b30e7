// Barriers of blocks and clusters.
#include "simt/device.h"
#include "simt/machine.h"

namespace tokenstep::simt {
namespace {

// Waits until `expected` threads have come; returns how many of them voted yes.
uint32_t meet(Barrier& barrier, uint32_t expected, bool vote, const char* what, const Where& where) {
  Thread& me = *machine.current;
  barrier.votes += vote;
  barrier.waiting.push_back(&me);
  if (barrier.waiting.size() < expected) {
    machine.park(what, where);
    return barrier.last_votes;
  }
  machine.order(barrier.waiting);
  barrier.waiting.pop_back();
  for (Thread* thread : barrier.waiting) machine.resume(thread);
  barrier.waiting.clear();
  barrier.last_votes = std::exchange(barrier.votes, 0);
  me.where = where;
  machine.yield();
  return barrier.last_votes;
}

}  // namespace

// All threads of the block must come to the same line: CUDA leaves open what happens otherwise.
uint32_t sync_block(const char* what, bool vote, Where where) {
  Barrier& barrier = machine.current->block->barrier[0];
  if (!barrier.waiting.empty() && !same_place(barrier.where, where)) {
    const uint3& other = barrier.waiting.front()->index;
    machine.fail(
        "divergent barrier: it is at %s in line %u, but thread (%u, %u, %u) waits at the one in line %u",
        what, where.line(), other.x, other.y, other.z, barrier.where.line());
  }
  barrier.where = where;
  return meet(barrier, machine.block_threads(), vote, what, where);
}

void sync_some(uint32_t barrier, uint32_t threads, Where where) {
  if (barrier == 0 || barrier >= kBarriers)
    machine.fail("barrier %u in line %u, expected 1 to %u", barrier, where.line(), kBarriers - 1);
  if (threads == 0 || threads % 32 || threads > machine.block_threads())
    machine.fail("barrier %u in line %u for %u threads, expected a multiple of 32, at most the block",
                 barrier, where.line(), threads);
  Barrier& named = machine.current->block->barrier[barrier];
  if (!named.waiting.empty() && named.expected != threads)
    machine.fail("barrier %u in line %u for %u threads, but others wait there for %u", barrier, where.line(),
                 threads, named.expected);
  named.expected = threads;
  meet(named, threads, false, "a named barrier", where);
}

void arrive_at_cluster(Where where) {
  Thread& me = *machine.current;
  Cluster& cluster = *me.block->cluster;
  SplitBarrier& barrier = cluster.barrier;
  if (me.arrived_at_cluster)
    machine.fail("it arrives twice at the cluster's barrier, in line %u", where.line());
  me.arrived_at_cluster = true;
  me.cluster_phase = barrier.phase;
  me.where = where;
  barrier.known.add(me.clock.known, me.number, me.clock.tick);
  barrier.fenced.add(me.clock.fenced, me.number, me.clock.fenced_tick);
  me.known_at_arrival = me.clock.known;
  ++me.clock.tick;
  if (++barrier.arrived < machine.block_threads() * cluster.blocks.size()) return;
  ++barrier.phase;
  barrier.arrived = 0;
  barrier.last_known = barrier.known.take();
  barrier.last_fenced = barrier.fenced.take();
  for (Thread* thread : barrier.waiting) machine.resume(thread);
  barrier.waiting.clear();
}

void wait_for_cluster(Where where) {
  Thread& me = *machine.current;
  SplitBarrier& barrier = me.block->cluster->barrier;
  if (!me.arrived_at_cluster)
    machine.fail("it waits at the cluster's barrier without having arrived, in line %u", where.line());
  me.arrived_at_cluster = false;
  if (barrier.phase == me.cluster_phase) {
    barrier.waiting.push_back(&me);
    machine.park("the cluster's barrier", where);
  }
  // What it knew when it arrived is in there. If it has learnt nothing since, it can share the others' clock.
  const bool nothing_new = me.clock.known == std::exchange(me.known_at_arrival, {});
  me.clock.known = nothing_new ? barrier.last_known : me.clock.known.joined(barrier.last_known);
  me.clock.fenced = me.clock.fenced.joined(barrier.last_fenced);
  ++me.clock.tick;
}

}  // namespace tokenstep::simt
