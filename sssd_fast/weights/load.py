"""Weights from other projects into this package's models.

    report = load_into(model, "mae_pretrain_vit_base.pth", source_norm=IMAGENET)
    print(report.table())

A source that does not fit the model is an error, never a partial load.

Pixel normalisation. A patch projection fits the (mean, std) its images were scaled with. For a grey
model, the weights of the channels are summed, which keeps the tokens of a grey image if both models
scale every channel by the same mean and std. If they differ, give `source_norm`: the change of
scale is then folded into weight and bias, which is exact. The decoder's prediction of a patch, in
the order (row, column, channel), is averaged over channels.

Shapes: D encoder width, L patches, p prefix tokens, P patch side, C channels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sssd_fast.errors import WeightsError
from sssd_fast.model import MAE, Classifier
from sssd_fast.weights.files import Norm, Source, listed, read_source
from sssd_fast.weights.formats import Format, Model, Named, to_own_names

# What facebookresearch/mae and Hugging Face's ViTMAE were trained with
IMAGENET: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# smallest fraction of the model's encoder tensors that must be loaded, and of the source's used
MIN_MATCHED = 0.9
STATUSES = ("matched", "converted", "missing", "new", "unexpected", "not used")
PROJECTION = "encoder.patch_embed.proj"
HEADS = ("head.", "fc_norm.")


class Row(NamedTuple):
    # loaded (two kinds); only in the model (an error, or new by design); only in the source (both)
    status: str
    # in this package, or in the source if it has no counterpart
    name: str
    source: str
    how: str


@dataclass
class LoadReport:
    """What became of every tensor of the model and of the source."""

    path: str
    format: Format
    tensors: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, status: str, name: str, source: str, how: str) -> None:
        self.tensors.append(Row(status, name, source, how))

    def rows(self, *statuses: str) -> list[Row]:
        return [row for row in self.tensors if row.status in statuses]

    @property
    def summary(self) -> str:
        n = Counter(row.status for row in self.tensors)
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return (
            f"{n['matched'] + n['converted']} tensors loaded from {self.path} ({self.format}), "
            f"{n['converted']} of them converted; {n['missing']} missing, {n['new']} new by "
            f"design, {n['unexpected']} unexpected, {n['not used']} not used{notes}"
        )

    def table(self) -> str:
        """The summary, then one line per kind of tensor, for all blocks with the same result."""
        kinds: Counter[Row] = Counter()
        for row in sorted(self.tensors, key=lambda row: STATUSES.index(row.status)):
            if row.status in ("new", "not used") and row.name.startswith("decoder."):
                row = row._replace(name="decoder.*", source="")
            elif row.status not in ("missing", "unexpected"):
                name, source = (re.sub(r"\.\d+\.", ".*.", text) for text in (row.name, row.source))
                row = row._replace(name=name, source=source)
            kinds[row] += 1
        lines = [self.summary]
        for (status, name, source, how), count in kinds.items():
            arrow = f" <- {source}" if source not in ("", name) else ""
            times = f" ({count} tensors)" if count > 1 else ""
            lines.append(f"{status:<10} {name}{arrow}{times}" + (f" [{how}]" if how else ""))
        return "\n".join(lines)


def load_into(
    model: Model, source: str | Path | Mapping[str, Tensor], *, source_norm: Norm | None = None
) -> LoadReport:
    """Copies weights into `model` in place, all or nothing.

    Args:
        source: a path (see `read_source`) or a state dict in any known naming. Position tables are
            interpolated to the model's grid; without a config they are assumed to be square.
        source_norm: (mean, std) of x / 255 that the source was trained with; None = the model's.

    Raises WeightsError, with names, if too little fits, a shape cannot be converted, or the number
    of blocks or heads differs; the model is then unchanged.
    """
    given = read_source(source)
    try:
        format_, named = to_own_names(given.state)
    except WeightsError as error:
        raise WeightsError(f"{given.path}: {str(error).replace('FILE', given.path)}") from None
    report = LoadReport(given.path, format_, notes=list(given.notes))
    used = {found.source for found in named.values()}
    if format_ == "timm" and "patch_embed.proj.weight" not in used:
        prefix = named[f"{PROJECTION}.weight"].source.removesuffix("patch_embed.proj.weight")
        report.notes.append(f"only the tensors named {prefix}* are used")
    if source_norm is not None:
        _fold_norm(named, model, source_norm)
    elif given.norm is not None:
        own = (tuple(model.encoder.mean), tuple(model.encoder.std))
        theirs = tuple(tuple(x) * max(1, len(own[0]) // len(x)) for x in given.norm)
        were = f"pixels of the source were scaled with mean, std {theirs}"
        report.notes += [f"{were}, here with {own}"] * (theirs != own)

    target = model.state_dict()
    fresh = HEADS if _has_decoder(named) else (*HEADS, "decoder.")
    fitted: dict[str, Tensor] = {}
    misfits: list[str] = []
    for name, tensor in target.items():
        if name not in named:
            status = "new" if name.startswith(fresh) else "missing"
            report.add(status, name, "", "not in the source: keeps its initial value")
            continue
        found = named[name]
        fit, how = _fit(name, found.tensor, model, given, named, format_)
        if name.startswith("head.") and len(found.tensor) != len(tensor):
            how = f"head of {len(found.tensor)} classes, this model has {len(tensor)}"
            report.add("new", name, "", how)
        elif fit is None or fit.shape != tensor.shape:
            sizes = f"{list(found.tensor.shape)}, needs {list(tensor.shape)}"
            misfits.append(f"{name} is {sizes}{how and f' ({how})'}")
        else:
            how = "; ".join(filter(None, [found.how, how]))
            report.add("converted" if how else "matched", name, found.source, how)
            report.notes += [f"{name}: {how}"] if "guessed" in how else []
            fitted[name] = fit
    for name, found in named.items():
        if name not in target:
            why = _unused(name, model)
            status, shown = ("not used", name) if why else ("unexpected", found.source)
            report.add(status, shown, found.source, why)

    _require_fit(report, misfits, given, named, model)
    with torch.no_grad():
        for name, tensor in fitted.items():
            target[name].copy_(tensor)
    return report


def _unused(name: str, model: Model) -> str:
    """Why a tensor of the source is not used by design; "" if it is unexpected."""
    if name.startswith("decoder.") and isinstance(model, Classifier):
        return "a classifier has no decoder"
    if name.startswith(HEADS):
        return "this model has none"
    if name.startswith("encoder.norm."):
        return "mean pooling has its own fc_norm after the pooling"
    if name == "encoder.cls_token":
        return "this model has no cls token"
    if name.endswith("mask_token"):
        return "mask token of another method"
    if name.startswith(("student_head.", "teacher_head.")) or name == "center":
        return "self-distillation of pre-training"
    return "pooler of Hugging Face's ViT" if name.startswith("pooler.") else ""


def _fit(
    name: str, tensor: Tensor, model: Model, given: Source, named: Named, format_: Format
) -> tuple[Tensor | None, str]:
    """(tensor in the model's size, what was done), or (None, reason)."""
    how = []
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        return None, f"{kind} values; quantised weights have to be converted to float first"
    if tensor.dtype not in (torch.float32, torch.float64):
        how.append(f"from {str(tensor.dtype).removeprefix('torch.')}")
        tensor = tensor.float()
    grey, pixels = model.config.in_channels == 1, model.config.patch_size**2
    fit: Tensor | None = tensor
    if name.endswith("pos_embed") and tensor.ndim == 2:
        has_cls, own = "encoder.cls_token" in named, format_ == "sssd_fast"
        fit, done = _fit_positions(tensor, model, given, has_cls=has_cls, own=own)
        how += [done] if done else []
    elif grey and name == f"{PROJECTION}.weight" and tensor.ndim == 4 and tensor.shape[1] > 1:
        how.append(f"{tensor.shape[1]} -> 1 channel: summed")
        fit = tensor.sum(1, keepdim=True)
    elif grey and name.startswith("decoder.pred.") and len(tensor) == 3 * pixels:
        how.append("3 -> 1 channel: averaged")
        fit = tensor.unflatten(0, (pixels, 3)).mean(1)
    return fit, "; ".join(how)


def _fit_positions(
    pos_ND: Tensor, model: Model, given: Source, *, has_cls: bool, own: bool
) -> tuple[Tensor | None, str]:
    """The source may have a row for its cls token, or none. own: its names are this package's."""
    grid, p = model.encoder.grid, model.encoder.num_prefix
    for prefix in (int(has_cls), 0):
        patches = len(pos_ND) - prefix
        side = math.isqrt(max(patches, 0))
        # 16 rows can be 4 x 4 or 2 x 8: of our grid if the names are ours, else square
        guesses = [grid, (side, side)] if own else [(side, side), grid]
        guesses = guesses if given.grid is None else [given.grid]
        found = [guess for guess in guesses if math.prod(guess) == patches > 0]
        if found:
            break
    else:
        return None, f"{len(pos_ND)} rows are neither {grid[0]} x {grid[1]} nor a square of patches"
    rows, columns = found[0]
    how = []
    table_LD = pos_ND[prefix:]
    if (rows, columns) != grid:
        image = table_LD.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
        table_LD = image.permute(0, 2, 3, 1).flatten(0, 2)
        how.append(f"{rows} x {columns} -> {grid[0]} x {grid[1]} patches: bicubic")
    if has_cls and prefix == 0 and given.grid is None:
        how.append(f"guessed: a grid of {rows} x {columns}, without a row for the cls token")
    if prefix != p:
        how.append(f"{prefix} -> {p} prefix rows")
    kept = min(prefix, p)
    prefix_rows = torch.cat([pos_ND[:kept], pos_ND.new_zeros(p - kept, pos_ND.shape[1])])
    return torch.cat([prefix_rows, table_LD]), "; ".join(how)


def _fold_norm(named: Named, model: Model, source_norm: Norm) -> None:
    """Turns a projection of (x - m_s) / s_s into the equal one of (x - m_t) / s_t.

    w_t = w_s * s_t / s_s and b_t = b_s + sum over pixels of w_s * (m_t - m_s) / s_s, per channel.
    """
    weight, bias = named.get(f"{PROJECTION}.weight"), named.get(f"{PROJECTION}.bias")
    if weight is None or bias is None or weight.tensor.ndim != 4:
        # reported as missing or misfitting
        return
    config = model.config
    w_DCPP = weight.tensor.double()
    channels = w_DCPP.shape[1]
    values = [torch.tensor(x, dtype=torch.float64) for x in (config.mean, config.std, *source_norm)]
    mean_t, std_t, mean_s, std_s = values
    if any(len(x) not in (1, channels) for x in values) or bool((std_s <= 0).any()):
        raise WeightsError(
            f"source_norm is {source_norm}; needs (mean, std) with 1 or {channels} values each and "
            f"std above 0, for a source of {channels} channels and a model with mean {config.mean} "
            f"and std {config.std}"
        )
    shift_C = ((mean_t - mean_s) / std_s).expand(channels)
    b_D = bias.tensor.double() + w_DCPP.sum((2, 3)) @ shift_C
    w_DCPP = w_DCPP * (std_t / std_s).expand(channels)[:, None, None]
    how = f"scaled for mean {config.mean}, std {config.std}"
    for name, old, new in (("weight", weight, w_DCPP), ("bias", bias, b_D)):
        named[f"{PROJECTION}.{name}"] = old._replace(tensor=new.to(old.tensor.dtype), how=how)


def _require_fit(
    report: LoadReport, misfits: list[str], given: Source, named: Named, model: Model
) -> None:
    """Raises WeightsError with every reason why the source does not fit the model."""
    used = sum(row.name.startswith("encoder.") for row in report.rows("matched", "converted"))
    absent = [row.name for row in report.rows("missing")]
    missing = [name for name in absent if name.startswith("encoder.")]
    missing_decoder = [name for name in absent if name.startswith("decoder.")]
    unexpected = [row.name for row in report.rows("unexpected")]
    wanted = used + len(missing) + sum(text.startswith("encoder.") for text in misfits)
    config = model.config
    _, depth, heads = config.encoder_shape
    stacks = [("encoder", depth, "heads", heads, given.heads)]
    if isinstance(model, MAE) and _has_decoder(named):
        sizes = (config.decoder_depth, "decoder_heads", config.decoder_heads)
        stacks.append(("decoder", *sizes, given.decoder_heads))
    problems = []
    for part, blocks, setting, ours, theirs in stacks:
        numbers = (re.match(rf"{part}\.blocks\.(\d+)\.", name) for name in named)
        found = len({match[1] for match in numbers if match})
        if found != blocks:
            problems.append(f"the source's {part} has {found} blocks, the model's {blocks}")
        # weights do not show the number of heads, and a wrong one gives wrong tokens silently
        if theirs not in (None, ours):
            made = f"it was made with {setting} {theirs}, the model has {ours}"
            problems.append(f"{made}; set model.{setting}={theirs}")
    if misfits:
        shapes = f"{len(misfits)} tensors have shapes that cannot be converted"
        problems.append(f"{shapes}: {listed(misfits)}")
    if used < MIN_MATCHED * wanted:
        few = f"{used} of the model's {wanted} encoder tensors fit, needs {MIN_MATCHED:.0%}"
        problems.append(f"{few}; missing: {listed(missing)}")
    if used < MIN_MATCHED * (used + len(unexpected)):
        foreign = f"{len(unexpected)} tensors of the source are not in the model"
        problems.append(f"{foreign}: {listed(unexpected)}")
    if missing_decoder:
        without = f"{len(missing_decoder)} decoder tensors are missing"
        problems.append(f"{without}: {listed(missing_decoder)}")
    if problems:
        raise WeightsError(
            f"{report.path} ({report.format}) does not fit the model; nothing was loaded:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nSet model.width, patch_size and the others to the source's, or use other weights."
        )


def _has_decoder(named: Named) -> bool:
    return any(name.startswith("decoder.") for name in named)
