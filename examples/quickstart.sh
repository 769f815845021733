#!/bin/sh
# From a pretrained teacher to an inhibitor student, and the published student at work, offline: some minutes on two cores.
# Started again after an interruption, it goes on where it stopped.
set -eu
runs=runs/quickstart

echo "1/5  text: the documentation that comes with Python"
python examples/python_docs_text.py build/python-docs.txt

echo "2/5  distil: MiniLM's softmax attention becomes inhibitor attention"
inhibitor distill recipes/quickstart.yaml

echo "3/5  fine-tune the teacher on 480 short reviews"
inhibitor finetune --model minilm --task reviews --output $runs/teacher

echo "4/5  fine-tune the published student, distilled on more text, on the same"
inhibitor finetune --model models/inhibitor-minilm-l6 --task reviews --output $runs/student

echo "5/5  side by side"
inhibitor report $runs/teacher $runs/student --output $runs/report.html
