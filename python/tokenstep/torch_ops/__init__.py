"""``torch.ops.tokenstep.*``: the ops as torch sees them, for ``torch.compile``, ``torch.export`` and FX.

Importing this module registers them, and has ``torch.compile`` put them in place of ``tokenstep.sample``,
``apply_logits``, ``paged_attention``, ``append_kv`` and ``merge_attention`` wherever a compiled function
calls these: no graph break, and no change in what they compute. Outside of a compiled function the functions
stay as they are, and the dispatcher is not on the way. ``torch.export`` runs Python code as it is: a module
to be exported calls the functions of this module, which take the same arguments.

    import tokenstep as ts
    import tokenstep.torch_ops

    @torch.compile(fullgraph=True)
    def attend(q, k, v, k_cache, v_cache, block_table, seq_lens):
        return ts.paged_attention(q, k_cache, v_cache, block_table, seq_lens, k=k, v=v)

In the graph every array is a torch tensor, token histories are tensors, one a row, and a seed of None is
fresh entropy at each run. A :class:`tokenstep.Sampler` keeps its state outside of any graph: call ``step``
after the compiled part, or capture both in a CUDA graph.
"""

from __future__ import annotations

import torch

from tokenstep import attention as eager_attention
from tokenstep import sampling as eager_sampling
from tokenstep.torch_ops.attention import append_kv, merge_attention, paged_attention
from tokenstep.torch_ops.sampling import apply_logits, sample

__all__ = ["append_kv", "apply_logits", "merge_attention", "paged_attention", "sample"]

for _original, _by_ops in (
    (eager_attention.paged_attention, paged_attention),
    (eager_attention.append_kv, append_kv),
    (eager_attention.merge_attention, merge_attention),
    (eager_sampling.sample, sample),
    (eager_sampling.apply_logits, apply_logits),
):
    torch.compiler.substitute_in_graph(_original)(_by_ops)
