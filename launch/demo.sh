#!/usr/bin/env bash
# What `make demo` does after installing: data, a small CLIP, its ears, evaluation, a page. Run again, it resumes.
# SET: stamps (Tux Paint's, from Debian) or sample (the few that ship under tests/sample).
set -euo pipefail
set=${1:-stamps}
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu  # else DeepSpeed warns in each process that it found no GPU
    # malloc keeps tensors of up to 64 MB that a step frees; the kernel maps and zeroes them at each step otherwise
    export MALLOC_MMAP_THRESHOLD_=$((64 << 20)) MALLOC_TRIM_THRESHOLD_=$((512 << 20))
fi
clock() { echo "[$((SECONDS / 60)) min $((SECONDS % 60)) s] $*"; }

if [ "$set" = stamps ] && ! bash data_prep/get_stamps.sh data/stamps_source; then
    echo "The stamps cannot be fetched (apt-get and dpkg-deb of a Debian or Ubuntu machine do that); the demo goes on with tests/sample instead."
    set=sample
fi
if [ "$set" = stamps ] && ! python -c "import cairosvg" 2>/dev/null; then
    echo "A third of the pictures are drawings, which need libcairo2 (apt-get install libcairo2); the demo goes on with tests/sample instead."
    set=sample
fi
start="deepspeed --num_accelerators 2"
if [ "$set" = sample ] || [ "$gpus" = 1 ]; then  # the sample is too small to share
    start=python
fi
clock "shards"
python data_prep/shard.py configs/data/$set.yaml
clock "a small CLIP from scratch"
$start launch/pretrain.py configs/pretrain/${set}_clip.yaml
clock "the towers' vectors"
python data_prep/embed.py configs/pretrain/$set.yaml
clock "its ears"
if [ "$set" = stamps ]; then
    $start launch/pretrain.py --deepspeed_config ds.json
else
    $start launch/pretrain.py --deepspeed_config ds.json configs/pretrain/$set.yaml
fi
clock "evaluation"
python launch/evaluate.py configs/pretrain/$set.yaml
clock "done"
