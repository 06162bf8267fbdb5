"""Which rows of a result file belong together, which one stands for an op, and what a row says against the others and the ceilings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import mae_kernels

from . import machine
from .bench import OURS
from .formats import Document, Row

PROVIDERS = {
    "kernels": ("published", "tuned", "tuned compiled", "library", OURS, "ours compiled"),
    "attention": (
        "eager", "eager compiled", "sdpa auto", "sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa math", "xformers", OURS,
        "ours compiled",
    ),
    "step": ("published", "published compiled", "ViTMAE", "ViTMAE compiled", "plain", "plain compiled", OURS, "ours lean"),
}  # fmt: skip
PROVIDERS["memory"] = PROVIDERS["step"]
PHASES = ("forward", "backward", "forward+backward", "step", "memory")  # a later one tells more
DTYPES = {
    "cuda": ("fp32", "fp16", "bf16"),
    "cpu": ("bf16", "fp16", "fp32"),
}  # a later one is used more
MODEL = re.compile(
    r"ViT-B(/16, 224)?(, \d+ images)?"
)  # and nothing else: "ViT-B, CT" is another model
WATERFALL, LARGEST = "waterfall ", "largest batch "  # first words of cases that are shown apart


@dataclass(frozen=True)
class Group:
    """The providers that did the same work."""

    case: str
    shape: str
    dtype: str
    phase: str
    rows: dict[str, Row]  # by provider

    def time(self, provider: str) -> float | None:
        row = self.rows.get(provider)
        return row["time"]["median_us"] if row and row["time"] else None

    @property
    def batch(self) -> int:
        return max(batch(row) for row in self.rows.values())

    def providers(self, kind: str) -> list[str]:
        return ordered(self.rows, kind)

    def best_other(self) -> str | None:
        """The fastest provider that is not ours."""
        times = {
            name: time
            for name in self.rows
            if not is_ours(name) and (time := self.time(name)) is not None
        }
        return min(times, key=lambda name: times[name]) if times else None


def is_ours(provider: str) -> bool:
    return provider.split()[0] == OURS


def ordered(providers: Iterable[str], kind: str) -> list[str]:
    """As in the list of the kind, unknown ones behind it as they come."""
    known, found = PROVIDERS.get(kind, ()), dict.fromkeys(providers)
    return [name for name in known if name in found] + [name for name in found if name not in known]


def groups(document: Document) -> list[Group]:
    """In the order of the file, without the rows that are shown apart."""
    found: dict[tuple[str, str, str, str], Group] = {}
    for row in document["rows"]:
        if row["case"].startswith((WATERFALL, LARGEST)):
            continue
        name = (row["case"], row["shape"], row["dtype"], row["phase"])
        found.setdefault(name, Group(*name, rows={})).rows[row["provider"]] = row
    return list(found.values())


def batch(row: Row) -> int:
    """Images of a row; 0 where it does not say."""
    for place, name in (
        (row["more"], "batch"),
        (row["sizes"], "batch"),
        (row["sizes"], "images"),
        (row["sizes"], "B"),
    ):
        if isinstance(place.get(name), int):
            return int(place[name])
    told = re.search(r"(\d+) images", row["shape"])
    return int(told.group(1)) if told else 0


def representative(document: Document) -> list[Group]:
    """One group per case: ViT-B at the largest batch that has times, in the pass and the dtype that tell most."""
    best: dict[str, tuple[tuple[object, ...], Group]] = {}
    dtypes = DTYPES[document["device"]["type"]]
    for group in groups(document):
        measured = any(row["time"] or row["peak_bytes"] for row in group.rows.values())
        rank = (
            measured,
            _place(PHASES, group.phase),
            _place(dtypes, group.dtype),
            MODEL.fullmatch(group.shape) is not None,
            group.shape.startswith("ViT-B"),
            group.batch,
            max(row["bytes"] or 0 for row in group.rows.values()),
        )
        if group.case not in best or rank > best[group.case][0]:
            best[group.case] = (rank, group)
    return [group for _, group in best.values()]


def _place(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1


def fullest(document: Document) -> list[Group]:
    """Every case, shape and dtype once, in the pass that tells most: forward+backward where there is one."""
    best: dict[tuple[str, str, str], Group] = {}
    for group in groups(document):
        name = (group.case, group.shape, group.dtype)
        if name not in best or _place(PHASES, group.phase) > _place(PHASES, best[name].phase):
            best[name] = group
    return list(best.values())


def sites(document: Document) -> list[Group]:
    """Of attention: every site (tokens, heads) and dtype at its largest batch that has times, in the pass that tells most."""
    best: dict[tuple[object, ...], Group] = {}
    for group in fullest(document):
        sizes = next(iter(group.rows.values()))["sizes"]
        name = (
            group.dtype,
            *sorted((key, value) for key, value in sizes.items() if key != "batch"),
        )
        if name not in best or (_timed(group), group.batch) > (
            _timed(best[name]),
            best[name].batch,
        ):
            best[name] = group
    return list(best.values())


def _timed(group: Group) -> bool:
    return any(row["time"] for row in group.rows.values())


def waterfalls(document: Document) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by case, shape and dtype, in the order in which things are added."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in document["rows"]:
        if row["case"].startswith(WATERFALL):
            found.setdefault((row["case"], row["shape"], row["dtype"]), []).append(row)
    return {
        name: sorted(rows, key=lambda row: row["more"]["order"]) for name, rows in found.items()
    }


# ---- against the others, the ceilings and the sources of today ----


@dataclass(frozen=True)
class Share:
    """What a row reaches: of the ceiling ("copy" or "matmul") that would end the call later if it were reached."""

    per_s: float  # bytes or FLOP
    share: float
    ceiling: str


def share_of_ceiling(document: Document, row: Row) -> Share | None:
    """None without a time, or where neither bytes nor FLOPs with a measured ceiling are known."""
    if not row["time"]:
        return None
    seconds, ceilings = row["time"]["median_us"] / 1e6, document["ceilings"]
    found = []
    for amount, ceiling, name in (
        (row["bytes"], ceilings.get("copy_bytes_per_s"), "copy"),
        (row["flops"], ceilings.get("matmul_flops_per_s", {}).get(row["dtype"]), "matmul"),
    ):
        if amount and ceiling:
            found.append(Share(amount / seconds, amount / seconds / ceiling, name))
    return max(found, key=lambda one: one.share, default=None)


def peak_ratio(group: Group, provider: str) -> float | None:
    """Peak memory of a provider divided by ours."""
    ours, other = (group.rows.get(name, {}).get("peak_bytes") for name in (OURS, provider))
    return other / ours if ours and other else None


def is_stale(document: Document, row: Row) -> bool:
    """Whether the sources that the figure depends on have changed since. A row without a hash has that of its file."""
    told = row.get("sources")
    return bool(
        document["kernel_sources"] != _hash(None)
        if told is None
        else told != _hash(_source(document, row))
    )


def _source(document: Document, row: Row) -> str | None:
    kind = document["kind"]
    if kind in ("step", "memory"):
        return "step"
    if kind.startswith("loader"):
        return "crop_resize"
    name = str(row["case"]).partition(" ")[0].rstrip(",")
    return name if name in mae_kernels.__all__ else None


@cache
def _hash(what: str | None) -> str:
    return machine.sources_hash(what)
