"""A limit of memory, kept by smaller batches.

pass_memory   what a pass of so many rows takes
memory_limit  the largest sizes that keep to the limit
"""
