"""Replace parts of an existing masked autoencoder by the ops of mae_kernels, in one line.

    python examples/patch_facebook_mae.py

The model is ViTMAEForPreTraining of transformers, which has the weights of facebookresearch/mae;
MaskedAutoencoderViT of that repository is patched in the same way. Loss, gradients and state dict
stay the same up to rounding; `unpatch_model` removes the ops again.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import mae_kernels as mk

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--size", type=int, default=224, help="image side in pixels")
parser.add_argument("--width", type=int, default=192, help="encoder width, a multiple of 64")
parser.add_argument("--depth", type=int, default=12, help="encoder blocks")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--repeats", type=int, default=5)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
# For real weights: ViTMAEForPreTraining.from_pretrained("facebook/vit-mae-base")
config = ViTMAEConfig(
    image_size=args.size,
    hidden_size=args.width,
    num_hidden_layers=args.depth,
    num_attention_heads=args.width // 64,
    intermediate_size=4 * args.width,
    decoder_hidden_size=128,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=512,
    norm_pix_loss=True,
)
model = ViTMAEForPreTraining(config).to(device).train()
images = torch.randn(args.batch, 3, args.size, args.size, device=device)


def step() -> tuple[float, float]:
    """(loss, seconds) of a forward and backward pass; the mask has a fixed seed."""
    times = []
    for _ in range(args.repeats):
        model.zero_grad()
        torch.manual_seed(1)
        start = time.perf_counter()
        loss = model(images).loss
        loss.backward()
        result = loss.item()  # waits for the GPU
        times.append(time.perf_counter() - start)
    return result, min(times)


before, seconds_before = step()
print(mk.patch_model(model))
after, seconds_after = step()
print(f"loss before: {before:.6f}, after: {after:.6f}")
print(f"fastest step {1e3 * seconds_before:.1f} ms before, {1e3 * seconds_after:.1f} ms after")
mk.unpatch_model(model)
assert abs(after - before) < 1e-4 * before
