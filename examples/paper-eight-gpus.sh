#!/bin/sh
# The same on eight GPUs of one machine: the batches stay those of the paper, the grid runs eight trainings at a time.
# pip install 'inhibitor-attention[ray]'
set -eu
torchrun --standalone --nproc_per_node 8 -m inhibitor distill recipes/paper-e1-layerwise.yaml stages.0.batch_size=8
torchrun --standalone --nproc_per_node 8 -m inhibitor distill recipes/paper-e1.yaml stages.0.gradient_accumulation=2
inhibitor reproduce recipes/reproduce-paper.yaml processes=8 executor=ray
