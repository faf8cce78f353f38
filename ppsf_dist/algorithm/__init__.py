"""The formulas, one module for each idea of the literature. Pure functions of tensors and numbers.

Nothing here knows a shard or a process group: what must be summed over ranks comes in as a sum.
Functions whose name ends in an underscore overwrite their first argument, as in torch.
"""
