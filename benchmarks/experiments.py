"""The paper's experiments on paper: README's table and docs/results.md from the files that `sssd-fast reproduce` wrote, kept in
benchmarks/results/paper under any name. All of them are shown, GPUs first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sssd_fast.errors import SssdError
from sssd_fast.reproduce.table import LEGEND, SCHEMA, body, picture, summary

from .formats import markdown

Results = dict[str, Any]
FOLDER, PAGE, PICTURES = "paper", "docs/results.md", "docs/results"
UNMEASURED = "NVIDIA GPU: not measured."


def find(folder: Path) -> list[Results]:
    """Raises SssdError for a file that holds no reproduction, or one on validation images."""
    from sssd_fast.reproduce.public_sets import (
        PUBLIC_SETS,  # needs Pillow, which a machine that only measures ops may lack
    )

    loaded = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            schema, part, _ = found["schema"], found["part"], found["dataset"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SssdError(
                f"{path}: not a results.json of `sssd-fast reproduce` ({error})"
            ) from None
        if schema != SCHEMA:
            raise SssdError(
                f"{path}: its schema is {schema!r}, not {SCHEMA!r}; take a results.json of `sssd-fast reproduce`"
            )
        if found["dataset"] not in PUBLIC_SETS:
            raise SssdError(
                f"{path}: its data set is {found['dataset']!r}, known are {', '.join(PUBLIC_SETS)}"
            )
        if part != "test":
            raise SssdError(
                f"{path}: evaluated on {part} images, which is for choosing settings; only test images are reported"
            )
        loaded.append({**found, "file": path.name})
    return sorted(
        loaded,
        key=lambda one: (not on_gpu(one), list(PUBLIC_SETS).index(one["dataset"]), one["file"]),
    )


def on_gpu(results: Results) -> bool:
    return any(machine["type"] == "cuda" for machine in results["machines"])


def section(found: Sequence[Results]) -> str:
    """What README shows: one table per file of a GPU, accuracy alone. A processor trains models of another size: those are in the page."""
    blocks = (
        []
        if any(map(on_gpu, found))
        else [UNMEASURED + " Small models on a processor: docs/results.md." * bool(found)]
    )
    for results in filter(on_gpu, found):
        devices = ", ".join(dict.fromkeys(machine["device"] for machine in results["machines"]))
        header, rows = summary(results)
        size = results["settings"]["model"]["image_size"]
        blocks.append(
            f"**{results['title']}**, accuracy on test images, {size[0]} x {size[1]} pixels, {devices}"
        )
        blocks.append(markdown(header, rows))
    return "\n\n".join(blocks)


INTRODUCTION = f"""\
# The paper's experiments

Written by `sssd-fast bench report` from the files in `benchmarks/results/paper`; do not edit it by hand.

`sssd-fast reproduce covid-ct --data DIR` and `sssd-fast reproduce sars-cov-2-ct --data DIR` repeat what Tan et al. report
(Comput. Methods Programs Biomed. 243 (2024) 107876) and put it beside their figures. For each of five seeds and two splits they train
three models of one size: with self-distillation, without it, and without pre-training. `--external DIR` adds a fourth,
pre-trained on the other set's images too; `--minutes`, `--seeds`, `--protocols` and `--methods` do less, `--resume` goes on.

- **Two splits.** The paper's is stratified random over images: slices of one patient lie on both sides. The leak-controlled one is the
  authors' split by patient for COVID-CT, and the last 20 % of file numbers per class for SARS-CoV-2 CT, where no patients are recorded.
- **What the split gives away.** The last row is no model: the nearest training image on 32 x 32 grey pixels decides.
- **Nothing external**, unless a row says so: pre-training sees the training part alone, never validation or test images. External images
  with the pixels of an image of the set are left out.
- **The control without pre-training** trains all layers at one rate, since layer-wise decay presumes trained layers.
- **Settings are chosen on validation images:** `--part val --try 'finetune.base_lr=[5e-4, 1e-3]'` compares them and refuses test images.
- The paper's own settings are not public beyond its abstract; `paper_covid_ct` and `paper_sars_cov_2` follow SD-MAE and the literature on
  small CT sets, and say what was taken from where.

{LEGEND}

```
sssd-fast reproduce covid-ct --data path/to/covid-ct --out runs/covid-ct
sssd-fast reproduce sars-cov-2-ct --data path/to/sars-cov-2-ct --out runs/sars
sssd-fast reproduce covid-ct --data path/to/covid-ct --external path/to/sars-cov-2-ct --out runs/covid-ct-external
sssd-fast reproduce covid-ct --data path/to/covid-ct --config cpu_ct --out runs/covid-ct-cpu         # a small model, for two CPU cores
```

results.json of such a run, put into `benchmarks/results/paper`, stands below after `sssd-fast bench report`."""


def page(found: Sequence[Results]) -> str:
    blocks = [INTRODUCTION]
    if not any(map(on_gpu, found)):
        blocks += ["## On a GPU", UNMEASURED.replace("NVIDIA GPU: not", "Not")]
    for results in found:
        size = results["settings"]["model"]["image_size"]
        (width, depth, _) = _shape(results)
        blocks += [
            f"## {results['title']}: ViT {width}x{depth} on {size[0]} x {size[1]} pixels{'' if on_gpu(results) else ', CPU'}"
        ]
        if not on_gpu(results):
            blocks += [
                "A small model, trained for minutes on a processor: this shows that everything runs on the real images and how the "
                "methods compare at this size. It says nothing of the paper's model."
            ]
        blocks += ["\n".join(body(results)) + f"; file `{results['file']}`"]
        if results["cells"]:
            blocks += [
                f"![{results['title']}, accuracy of every model](results/{picture_of(results)})"
            ]
    return "\n\n".join(blocks) + "\n"


def _shape(results: Results) -> tuple[int, int, int]:
    from sssd_fast.config import ModelConfig

    return ModelConfig.model_validate(results["settings"]["model"]).encoder_shape


def picture_of(results: Results) -> str:
    return Path(results["file"]).with_suffix(".png").name


def draw(found: Sequence[Results], folder: Path) -> list[Path]:
    """One picture per file in docs/results."""
    drawn = [picture(results, path=folder / picture_of(results)) for results in found]
    return [path for path in drawn if path is not None]
