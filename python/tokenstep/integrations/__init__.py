"""The sampler and the attention inside other engines. Nothing of theirs is imported before it is used."""
