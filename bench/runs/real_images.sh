#!/usr/bin/env bash
# The runs on real images that docs/results.md reports, one after the other: two CPU cores, at most 45 minutes each.
# usage: bash bench/runs/real_images.sh   (COSA_SHARED: the folder that holds data/voc_animals and weights/)
set -euo pipefail
cd "$(dirname "$0")/../.."
shared=${COSA_SHARED:-../shared}
python=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE

common=(
  data.root="$shared/data/voc_animals" data.crop_size=224 data.workers=1 data.pipeline=torch
  "teacher.scales=[1.0]" teacher.momentum=0.99
  optim.batch_size=8 optim.lr=1e-4 optim.warmup=50
  eval.every=1000 "eval.scales=[1.0]" "eval.classes=[cat,cow,dog,horse,person,sheep]" "eval.coexistence=[horse,sheep]"
  run.log_every=10 --overwrite
)
lite0=(
  model.backbone=tf_efficientnet_lite0 model.weights="$shared/weights/tf_efficientnet_lite0.safetensors"
  model.aux_layer=-1 "data.mean=[0.5,0.5,0.5]" "data.std=[0.5,0.5,0.5]" optim.iterations=500 optim.cotrain_after=150
)
vit=(
  model.backbone=deit_small_patch16_224 model.weights="$shared/weights/deit_small_patch16_224_saliency_fp16.safetensors"
  optim.iterations=250 optim.cotrain_after=100
)
train=("$python" -m cosa_fast.train)

"${train[@]}" voc.yaml "${common[@]}" "${lite0[@]}" run.name=voc_animals_paper
"${train[@]}" voc.yaml "${common[@]}" "${lite0[@]}" optim.cotrain_after=500 run.name=voc_animals_classification
"${train[@]}" voc_published.yaml "${common[@]}" "${lite0[@]}" loss.energy=0 run.name=voc_animals_published
"${train[@]}" voc.yaml "${common[@]}" "${vit[@]}" run.name=voc_animals_vit
"$python" -m bench.runs.collect runs/voc_animals_* -o bench/results/voc_animals_cpu.json
