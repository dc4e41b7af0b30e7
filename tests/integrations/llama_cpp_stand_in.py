"""A llama-cpp-python of a few lines: exactly the interface that tokenstep.integrations.llama_cpp uses.

Logits are a function of the ids so far, at an address that stays the same, as llama.cpp's are.
``create_completion`` does what the real one does with a logits processor: the logits it shows are one field
of candidates, its exceptions are printed and ignored, and the largest value left is taken.
"""

import ctypes
import sys

import numpy as np

VOCAB_SIZE, END = 300, 7
CANDIDATE = [("id", np.intc), ("logit", np.single), ("p", np.single)]  # llama_token_data


class Llama:
    """The class; what is beyond the real one's interface begins with ``_``."""

    def __init__(self, n_ctx=64, *, can_forget=True):
        self.ctx, self.model = ("ctx", self), ("model", self)
        self.n_tokens = 0
        self.input_ids = np.zeros(n_ctx, np.intc)
        self._logits = np.zeros(VOCAB_SIZE, np.float32)
        self._can_forget, self._evaluated, self._poison = can_forget, [], {}

    def n_ctx(self):
        return len(self.input_ids)

    def n_vocab(self):
        return VOCAB_SIZE

    def token_eos(self):
        return END

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        assert all(type(token) is int for token in tokens)
        assert len(tokens) > 0
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self.n_tokens += len(tokens)
        self._evaluated.append(len(tokens))
        self._logits[:] = logits_after(self.input_ids[: self.n_tokens])
        if self.n_tokens in self._poison:
            self._logits[:] = self._poison[self.n_tokens]

    def create_completion(
        self,
        prompt,
        max_tokens,
        temperature=0.8,
        repeat_penalty=1.1,
        logits_processor=None,
        stopping_criteria=None,
    ):
        """Ids of a text, its end token included."""
        assert temperature == 0.0
        assert repeat_penalty == 1.0
        self.reset()
        self.eval(list(prompt))
        new = []
        while True:
            candidates = np.recarray(VOCAB_SIZE, dtype=CANDIDATE)
            candidates.logit[:] = self._logits
            ids = self.input_ids[: self.n_tokens]
            try:
                for processor in logits_processor:
                    candidates.logit[:] = processor(ids, candidates.logit)
            except Exception as error:
                print("Exception ignored on calling ctypes callback function:", error, file=sys.stderr)
            token = int(candidates.logit.argmax())
            if stopping_criteria is not None and stopping_criteria(ids, self._logits):
                return new
            new.append(token)
            if token == END or len(new) == max_tokens:
                return new
            self.eval([token])


def logits_after(ids):
    """float32 ``[V]``."""
    seed = [int(i) for i in ids[-4:]] + [len(ids)]
    return np.random.default_rng(seed).normal(scale=3.0, size=VOCAB_SIZE).astype(np.float32)


def llama_get_logits_ith(ctx, index):
    assert index == -1
    return ctx[1]._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def llama_model_get_vocab(model):
    return ("vocab", model[1])


def llama_vocab_is_eog(vocab, token):
    return token == END


def llama_get_memory(ctx):
    return ("memory", ctx[1])


def llama_memory_seq_rm(memory, sequence, begin, end):
    assert (sequence, end) == (-1, -1)
    return memory[1]._can_forget
