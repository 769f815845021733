#!/bin/sh
# The paper's experiments on one GPU, from the Hugging Face hub. Started again, it goes on where it stopped.
set -eu
inhibitor distill recipes/paper-e1-layerwise.yaml
inhibitor distill recipes/paper-e1.yaml
inhibitor reproduce recipes/reproduce-paper.yaml
