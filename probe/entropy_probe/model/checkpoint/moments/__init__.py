"""The optimizer's state by parameter name.

adam     Adam's state;   others  optimizers that are not Adam's;   rule  which keys are Adam's
blocks   moments in 8 bits
order    which parameter each of its tensors belongs to: by name, by known `groupings`,
         or by `content` where several fit
"""
