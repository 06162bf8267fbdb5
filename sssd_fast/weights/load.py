"""Weights from other projects into this package's models.

    report = load_into(model, "mae_pretrain_vit_base.pth", source_norm=IMAGENET)
    print(report.table())

A source that does not fit the model is an error, never a partial load: the report lists every
tensor of the model and of the source.

Pixel normalisation. A patch projection fits the (mean, std) its images were scaled with. Between 3
and 1 channels its weights are summed (3 -> 1) or divided by 3 (1 -> 3), which keeps the tokens of a
grey image if both models scale every channel by the same mean and std. If they differ, give
`source_norm`: the change of scale is then folded into weight and bias, which is exact. The
decoder's prediction of a patch, in the order (row, column, channel), is averaged over channels
(3 -> 1) or repeated (1 -> 3).

Shapes: D encoder width, L patches, p prefix tokens, P patch side, C channels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sssd_fast.errors import WeightsError
from sssd_fast.model import MAE, Classifier
from sssd_fast.weights.files import Norm, Source, listed, read_source
from sssd_fast.weights.formats import Format, Model, Named, to_own_names

_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
# What facebookresearch/mae and Hugging Face's ViTMAE were trained with
IMAGENET: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# smallest fraction of the model's encoder tensors that must be loaded, and of the source's used
MIN_MATCHED = 0.9
# what became of a tensor: loaded (as it is, or converted); in the model but not in the source (an
# error, or new by design); in the source but not in the model (an error, or by design)
STATUSES = ("matched", "converted", "missing", "new", "unexpected", "not used")


class Row(NamedTuple):
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
        n = {status: len(self.rows(status)) for status in STATUSES}
        return (
            f"{n['matched'] + n['converted']} tensors loaded from {self.path} ({self.format}), "
            f"{n['converted']} of them converted; {n['missing']} missing, {n['new']} new by "
            f"design, {n['unexpected']} unexpected, {n['not used']} not used"
        )

    def table(self) -> str:
        """The summary, then one line per kind of tensor, for all blocks with the same result."""
        lines = [self.summary, *(f"note: {note}" for note in self.notes)]
        by_part = Counter((row.status, row.name.split(".")[0], row.how) for row in self.tensors)
        groups: dict[tuple[str, str, str, str], list[int]] = {}
        for row in sorted(self.tensors, key=lambda row: STATUSES.index(row.status)):
            part = row.name.split(".")[0]
            count = by_part[row.status, part, row.how]
            if row.status in ("new", "not used") and count > 4:
                # a whole decoder or head
                groups[row.status, f"{part}.* ({count} tensors)", "", row.how] = []
                continue
            block = _BLOCK.search(row.name)
            name, source = (_BLOCK.sub("*", text, count=1) for text in (row.name, row.source))
            members = groups.setdefault((row.status, name, source, row.how), [])
            members += [int(block[0])] if block else []
        for (status, name, source, how), blocks in groups.items():
            arrow = f" <- {source}" if source not in ("", name) else ""
            numbers = ",".join(map(str, sorted(blocks)))
            if len(blocks) > 1 and max(blocks) - min(blocks) == len(blocks) - 1:
                numbers = f"{min(blocks)}-{max(blocks)}"
            shown = name.replace("*", numbers, 1) if blocks else name
            lines.append(f"{status:<10} {shown}{arrow}" + (f" [{how}]" if how else ""))
        return "\n".join(lines)


def load_into(
    model: Model,
    source: str | Path | Mapping[str, Tensor],
    *,
    part: Literal["auto", "encoder"] = "auto",
    source_norm: Norm | None = None,
) -> LoadReport:
    """Copies weights into `model` in place, all or nothing.

    Args:
        source: a path (see `read_weights`) or a state dict in any known naming. Position tables are
            interpolated to the model's grid (bicubic with antialiasing, prefix rows kept); a source
            without a config is assumed to be square.
        part: "auto" loads what model and source share; "encoder" leaves decoder, fc_norm and head.
        source_norm: (mean, std) of x / 255 that the source was trained with; None = the model's.

    Raises WeightsError, with names, if too little fits, a shape cannot be converted, or the number
    of blocks or heads differs; the model is then unchanged.
    """
    given = read_source(source)
    try:
        format_, named = to_own_names(given.state)
    except WeightsError as error:
        raise WeightsError(f"{given.path}: {error}") from None
    report = LoadReport(given.path, format_)
    _check_heads(model, given, named)
    if source_norm is not None:
        _fold_norm(named, model, source_norm)
    report.notes += _notes(model, given, folded=source_norm is not None)
    _drop_other_head(named, model, report)

    target = model.state_dict()
    fresh = ("head.", "fc_norm.") if _has_decoder(named) else ("head.", "fc_norm.", "decoder.")
    fitted: dict[str, Tensor] = {}
    misfits: list[str] = []
    for name, tensor in target.items():
        if part == "encoder" and not name.startswith("encoder."):
            report.add("new", name, "", "part='encoder'")
        elif name not in named:
            status = "new" if name.startswith(fresh) else "missing"
            report.add(status, name, "", "not in the source: keeps its initial value")
        else:
            found = named[name]
            fit, how = _fit(name, found.tensor, model, given, named, format_)
            if fit is None or fit.shape != tensor.shape:
                sizes = f"{list(found.tensor.shape)}, needs {list(tensor.shape)}"
                misfits.append(f"{name} is {sizes}{how and f' ({how})'}")
                continue
            how = "; ".join(filter(None, [found.how, how]))
            report.add("converted" if how else "matched", name, found.source, how)
            fitted[name] = fit
    for name, found in named.items():
        if name not in target or (part == "encoder" and not name.startswith("encoder.")):
            why = _unused(name, model, part)
            status, shown = ("not used", name) if why else ("unexpected", found.source)
            report.add(status, shown, found.source, why)

    _require_fit(report, misfits, named, model, part)
    with torch.no_grad():
        for name, tensor in fitted.items():
            target[name].copy_(tensor)
    return report


def _unused(name: str, model: Model, part: str) -> str:
    """Why a tensor of the source is not used by design; "" if it is unexpected."""
    if name.startswith(("decoder.", "fc_norm.", "head.")) and part == "encoder":
        return "part='encoder'"
    if name.startswith("decoder.") and isinstance(model, Classifier):
        return "a classifier has no decoder"
    if name.startswith(("head.", "fc_norm.")):
        return "this model has none"
    if name.startswith("encoder.norm."):
        return "mean pooling has its own fc_norm after the pooling"
    if name == "encoder.cls_token":
        return "this model has no cls token"
    if name.startswith(("student_head.", "teacher_head.")) or name == "center":
        return "self-distillation of pre-training"
    return "pooler of Hugging Face's ViT" if name.startswith("pooler.") else ""


def _drop_other_head(named: Named, model: Model, report: LoadReport) -> None:
    """A head for another number of classes is not used."""
    head = named.get("head.weight")
    if not isinstance(model, Classifier) or head is None or len(head.tensor) == model.num_classes:
        return
    for name in ("head.weight", "head.bias"):
        if name in named:
            how = f"head of {len(head.tensor)} classes, this model has {model.num_classes}"
            report.add("not used", name, named.pop(name).source, how)


def _notes(model: Model, given: Source, *, folded: bool) -> list[str]:
    config, notes = model.config, []
    own = (tuple(model.encoder.mean), tuple(model.encoder.std))
    if given.norm is not None and not folded:
        theirs = tuple(tuple(x) * (config.in_channels // len(x)) for x in given.norm)
        if theirs != own:
            were = f"pixels of the source were scaled with mean, std {theirs}"
            notes.append(f"{were}, here with {own}")
    eps = given.norm_eps
    if eps not in (None, config.norm_eps):
        notes.append(f"norm_eps of the source is {eps:g}, this model's is {config.norm_eps:g}")
    return notes


def _fit(
    name: str, tensor: Tensor, model: Model, given: Source, named: Named, format_: Format
) -> tuple[Tensor | None, str]:
    """(tensor in the model's size, what was done), or (None, reason)."""
    how = []
    if tensor.dtype not in (torch.float32, torch.float64):
        how.append(f"from {str(tensor.dtype).removeprefix('torch.')}")
        tensor = tensor.float()
    channels, pixels = model.config.in_channels, model.config.patch_size**2
    if name.endswith("pos_embed") and tensor.ndim == 2:
        fit, done = _fit_positions(tensor, model, given, named, format_)
        return fit, "; ".join(filter(None, [*how, done]))
    if name == "encoder.patch_embed.proj.weight" and tensor.ndim == 4:
        if tensor.shape[1] != channels == 1:
            how.append(f"{tensor.shape[1]} -> 1 channel: summed")
            tensor = tensor.sum(1, keepdim=True)
        elif tensor.shape[1] == 1 != channels:
            how.append(f"1 -> {channels} channels: divided by {channels}")
            tensor = (tensor / channels).expand(-1, channels, -1, -1)
    elif name.startswith("decoder.pred.") and len(tensor) % pixels == 0:
        by_pixel = tensor.reshape(pixels, -1, *tensor.shape[1:])
        if by_pixel.shape[1] != channels == 1:
            how.append(f"{by_pixel.shape[1]} -> 1 channel: averaged")
            tensor = by_pixel.mean(1)
        elif by_pixel.shape[1] == 1 != channels:
            how.append(f"1 -> {channels} channels: repeated")
            tensor = by_pixel.repeat_interleave(channels, 1).flatten(0, 1)
    return tensor, "; ".join(how)


def _fit_positions(
    pos_ND: Tensor, model: Model, given: Source, named: Named, format_: Format
) -> tuple[Tensor | None, str]:
    grid, p = model.encoder.grid, model.encoder.num_prefix
    tokens = sum(name in named for name in ("encoder.cls_token", "dist_token"))
    tokens += named["reg_token"].tensor.shape[1] if "reg_token" in named else 0
    sizes = _source_grid(len(pos_ND), tokens, grid, given.grid, own=format_ == "sssd_fast")
    if sizes is None:
        return None, f"{len(pos_ND)} rows are neither {grid[0]} x {grid[1]} nor a square of patches"
    (rows, columns), prefix = sizes
    how = []
    table_LD = pos_ND[prefix:]
    if (rows, columns) != grid:
        image = table_LD.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
        table_LD = image.permute(0, 2, 3, 1).flatten(0, 2)
        how.append(f"{rows} x {columns} -> {grid[0]} x {grid[1]} patches: bicubic")
    if prefix != p:
        how.append(f"{prefix} -> {p} prefix rows")
    kept = min(prefix, p)
    prefix_rows = torch.cat([pos_ND[:kept], pos_ND.new_zeros(p - kept, pos_ND.shape[1])])
    return torch.cat([prefix_rows, table_LD]), "; ".join(how)


def _source_grid(
    rows: int, tokens: int, grid: tuple[int, int], known: tuple[int, int] | None, *, own: bool
) -> tuple[tuple[int, int], int] | None:
    """(grid of the source's position table, its prefix rows: one per prefix token, or none)."""
    if known is not None:
        prefix = rows - known[0] * known[1]
        return (known, prefix) if prefix in (0, tokens) else None
    for prefix in (tokens, 0):
        side = math.isqrt(max(rows - prefix, 0))
        square = side > 0 and side * side == rows - prefix
        # 16 rows can be 4 x 4 or 2 x 8: of our grid if the names are ours, else square
        if rows - prefix == grid[0] * grid[1] and (own or not square):
            return grid, prefix
        if square:
            return (side, side), prefix
    return None


def _fold_norm(named: Named, model: Model, source_norm: Norm) -> None:
    """Turns a projection of (x - m_s) / s_s into the equal one of (x - m_t) / s_t.

    w_t = w_s * s_t / s_s and b_t = b_s + sum over pixels of w_s * (m_t - m_s) / s_s, per channel.
    """
    key = "encoder.patch_embed.proj"
    weight, bias = named.get(f"{key}.weight"), named.get(f"{key}.bias")
    if weight is None or bias is None or weight.tensor.ndim != 4:
        # reported as missing or misfitting
        return
    config = model.config
    channels: int = config.in_channels
    how = [f"scaled for mean {config.mean}, std {config.std}"]
    w_DCPP = weight.tensor.double()
    if w_DCPP.shape[1] == 1 < channels:
        how.insert(0, f"1 -> {channels} channels: divided by {channels}")
        w_DCPP = (w_DCPP / channels).expand(-1, channels, -1, -1)
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
    done = "; ".join(how)
    named[f"{key}.weight"] = weight._replace(tensor=w_DCPP.to(weight.tensor.dtype), how=done)
    named[f"{key}.bias"] = bias._replace(tensor=b_D.to(bias.tensor.dtype), how=how[-1])


def _check_heads(model: Model, given: Source, named: Named) -> None:
    """Weights do not show the number of heads, and a wrong one gives wrong tokens silently."""
    config = model.config
    needed = [("heads", given.heads, config.encoder_shape[2])]
    if isinstance(model, MAE) and _has_decoder(named):
        needed.append(("decoder_heads", given.decoder_heads, config.decoder_heads))
    for name, theirs, ours in needed:
        if theirs not in (None, ours):
            way = ", or load part='encoder'" if name == "decoder_heads" else ""
            raise WeightsError(
                f"{given.path} was made with {name} {theirs}, the model has {ours}; set "
                f"model.{name}={theirs}{way}"
            )


def _require_fit(
    report: LoadReport, misfits: list[str], named: Named, model: Model, part: str
) -> None:
    """Raises WeightsError with every reason why the source does not fit the model."""
    used = sum(row.name.startswith("encoder.") for row in report.rows("matched", "converted"))
    absent = [row.name for row in report.rows("missing")]
    missing = [name for name in absent if name.startswith("encoder.")]
    missing_decoder = [name for name in absent if name.startswith("decoder.")]
    unexpected = [row.name for row in report.rows("unexpected")]
    wanted = used + len(missing) + sum(text.startswith("encoder.") for text in misfits)
    config = model.config
    width, depth, _ = config.encoder_shape
    depths = {"encoder": depth}
    ours = f"width {width}, patch {config.patch_size}, {config.in_channels} channels"
    advice = "Set model.* to the source's sizes, or use other weights"
    if isinstance(model, MAE) and part == "auto" and _has_decoder(named):
        depths["decoder"] = config.decoder_depth
        ours += f", decoder width {config.decoder_width}"
        advice += "; part='encoder' leaves the decoder at its initial values"
    problems = [
        f"the source's {name} has {_depth(name, named)} blocks, the model's {blocks}"
        for name, blocks in depths.items()
        if _depth(name, named) != blocks
    ]
    shapes = f"{len(misfits)} tensors have shapes that cannot be converted: {listed(misfits)}"
    few = (
        f"{used} of the model's {wanted} encoder tensors fit, needs {MIN_MATCHED:.0%}; "
        f"missing: {listed(missing)}"
    )
    foreign = f"{len(unexpected)} tensors of the source are not in the model: {listed(unexpected)}"
    without = f"{len(missing_decoder)} decoder tensors are missing: {listed(missing_decoder)}"
    problems += [shapes] * bool(misfits)
    problems += [few] * (used < MIN_MATCHED * wanted)
    problems += [foreign] * (used < MIN_MATCHED * (used + len(unexpected)))
    problems += [without] * bool(missing_decoder)
    if problems:
        raise WeightsError(
            f"{report.path} ({report.format}) does not fit the model; nothing was loaded:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + f"\nThe source has {_sizes(named)}; the model has {ours}. {advice}."
        )


def _has_decoder(named: Named) -> bool:
    return any(name.startswith("decoder.") for name in named)


def _depth(part: str, named: Named) -> int:
    found = (re.match(rf"{part}\.blocks\.(\d+)\.", name) for name in named)
    return len({match[1] for match in found if match})


def _sizes(named: Named) -> str:
    text = "no patch projection"
    proj = named.get("encoder.patch_embed.proj.weight")
    embed = named.get("decoder.embed.weight")
    if proj is not None and proj.tensor.ndim == 4:
        width, channels, patch, _ = proj.tensor.shape
        text = f"width {width}, patch {patch}, {channels} channels"
    return text + (f", decoder width {len(embed.tensor)}" if embed is not None else "")
