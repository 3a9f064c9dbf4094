"""One reader a format, `read(layout) -> Stored`. Nothing in a file is executed.

trainer     folders of the Trainer, of TRL and of `save_pretrained`
dcp         folders of torch.distributed.checkpoint (dcp_metadata: their .metadata);   fsdp  accelerate's
torchtitan  step-N/;   verl  a file for each rank;   deepspeed, deepspeed_universal  ZeRO's
"""
