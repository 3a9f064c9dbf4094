#!/bin/sh
# Make checkpoints.tar.xz beside this file: sh make.sh, with deepspeed installed.
set -e
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
ranks() { n=$1; shift; python -m torch.distributed.run --standalone --nproc_per_node "$n" "$here/make.py" "$out" "$@"; }
ranks 2 1-bf16 2-fp16 2-bf16-frozen 3-bf16-frozen 3-bf16-lora
ranks 1 2-fp32
for case in 1-bf16-2 3-bf16-frozen-2; do
    cp -r "$out/$case" "$out/$case-universal"
    cd "$out/$case-universal"
    python -m deepspeed.checkpoint.ds_to_universal --input_folder global_step3 --output_folder global_step3_universal \
        --num_extract_workers 1 --num_merge_workers 1 --inject_missing_state
    rm -r global_step3 latest
done
cd "$out"
find . -name "zero_to_*.py" -delete
find . -name README.md -delete
find . -type f | LC_ALL=C sort | tar --no-recursion -T - --owner 0 --group 0 --mtime 2026-01-01 -cJf "$here/checkpoints.tar.xz"
