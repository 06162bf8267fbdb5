"""From a folder of CT images to a report, with the Python API.

    python examples/train_your_ct.py path/to/ct --config 8gb --out runs/ct

`path/to/ct` has one folder per class, such as covid/ and normal/, with PNG or JPEG slices at any
depth. Without a path, synthetic slices are used. `--set key=value` changes a setting;
`sssd-fast configs 8gb` prints all of them with a description.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sssd_fast as sf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", nargs="?", default="synthetic")
parser.add_argument("--config", default="cpu_smoke")
parser.add_argument("--out", type=Path, default=Path("runs/your_ct"))
parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
args = parser.parse_args()

# 1. Pre-train without labels: reconstruct masked patches, distil the decoder into the encoder.
pretrained = sf.pretrain(
    args.data, config=args.config, settings=args.set, out=args.out / "pretrain", overwrite=True
)

# 2. Fine-tune a classifier on the labels and evaluate it on the test split. Data, split and model
#    are those of the pre-training run.
finetuned = sf.finetune(
    init=pretrained.out, settings=args.set, out=args.out / "finetune", overwrite=True
)
image = finetuned.metrics["image"]
print(f"test: accuracy {image['accuracy']:.3f}, AUC {image['auc']:.3f}, n = {image['n']}")

# 3. A second opinion on the encoder: logistic regression on its frozen features.
probed = sf.probe(init=pretrained.out, settings=args.set, out=args.out / "probe", overwrite=True)
print(f"linear probe: accuracy {probed.metrics['image']['accuracy']:.3f}")

# 4. Use the model: score images, or take the encoder into your own code.
encoder = sf.load_encoder(finetuned.out)
print(f"the encoder maps {encoder.image_size} pixels to {encoder.width} features")
print(f"report: {finetuned.out / 'report.html'}")
