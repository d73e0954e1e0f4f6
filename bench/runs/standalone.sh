#!/usr/bin/env bash
# CoSA on real images, its pseudo-labels, and a DeepLabV3+ on these: some two hours of one CPU core.
# usage: bash bench/runs/standalone.sh   (COSA_SHARED: the folder that holds data/voc_animals and weights/)
set -euo pipefail
cd "$(dirname "$0")/../.."
shared=${COSA_SHARED:-../shared}
python=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE

common=(
  data.root="$shared/data/voc_animals" data.crop_size=160 data.workers=1 data.pipeline=torch
  "data.mean=[0.5,0.5,0.5]" "data.std=[0.5,0.5,0.5]" model.weights="$shared/weights/tf_efficientnet_lite0.safetensors"
  optim.batch_size=8 optim.warmup=30 optim.iterations=300
  eval.every=1000 "eval.scales=[1.0]" "eval.classes=[cat,cow,dog,horse,person,sheep]" "eval.coexistence=[horse,sheep]"
  run.log_every=10 --overwrite
)
cosa=runs/standalone_cosa ms=runs/standalone_ms
"$python" -m cosa_fast.train voc.yaml "${common[@]}" model.backbone=tf_efficientnet_lite0 model.aux_layer=-1 \
  "teacher.scales=[1.0]" teacher.momentum=0.98 optim.lr=1e-4 optim.cotrain_after=100 run.name=standalone_cosa
"$python" -m cosa_fast.evaluate "$cosa/checkpoints/best.pt" --network an --json "$cosa/an.json"
"$python" -m cosa_fast.predict "$cosa/checkpoints/best.pt" --split train_aug --what cpl -o "$cosa/cpl"
"$python" -m cosa_fast.train ms.yaml "${common[@]}" model.backbone=tu-tf_efficientnet_lite0 \
  data.pseudo_labels="$cosa/cpl" optim.lr=2e-4 run.name=standalone_ms
"$python" -m bench.runs.standalone "$cosa/an.json" "$ms" -o bench/results/ms_cpu.json
