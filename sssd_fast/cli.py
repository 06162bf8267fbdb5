"""The command line: parses, calls one function of commands.py, and turns errors into one message and an exit code.

0 done, 2 bad configuration, data or files, 3 numerics, 130/143 interrupted after a saved checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sssd_fast import __version__, commands
from sssd_fast.errors import SssdError

OVERRIDES = "settings as key=value, such as pretrain.epochs=400 data.source=ct/ (see `sssd-fast configs NAME`)"


def main(argv: Sequence[str] | None = None) -> int:
    # Read when torch is loaded, which is later: torch's CPU threads then sleep while they wait for each other. Spinning, the
    # default, makes a step 2.5 times slower where another process shares the cores (measured: 2 threads on 2 busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch's own choice is a temporary folder, which the next start of the machine empties.
    cache = Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sssd_fast", "inductor"
    )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    words = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(function=_bench, words=words[1:])
    if words[:1] != [
        "bench"
    ]:  # the benchmarks have a parser of their own, which gets every word, --help too
        args = _parse(words)
    args.command = shlex.join(["sssd-fast", *words])
    try:
        return int(args.function(args) or 0)  # `bench` has an exit code of its own
    except SssdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, such as `| head`
        sys.stderr.close()
        return 141
    except Exception as error:
        from sssd_fast.run.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({str(error).splitlines()[0]}). Lower batch_size and raise accumulate by the same factor: the "
            f"effective batch and the learning rate stay the same.",
            file=sys.stderr,
        )
        return 2


def _bench(args: argparse.Namespace) -> int:
    """Hands args.words to the benchmarks, which lie beside this package in a checkout and are no part of an installation."""
    root = Path(__file__).resolve().parent.parent
    # An installed package may have a stranger named benchmarks beside it; the ops' folder tells a checkout from that.
    if not (
        Path(root, "benchmarks", "__main__.py").is_file()
        and Path(root, "kernels", "mae_kernels").is_dir()
    ):
        raise SssdError(
            "bench needs a checkout of the repository: the benchmarks are not part of the installed package, which lies in "
            f"{root}; clone the repository, and in it run `make setup` and `.venv/bin/sssd-fast bench ...`"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found = importlib.util.find_spec("benchmarks")
    where = found.origin if found is not None else None
    if where is None or Path(where).resolve().parent != root / "benchmarks":
        raise SssdError(
            f"bench needs the package benchmarks in {root}, but Python finds another one of that name ({where or 'no file'}); "
            f"take its folder out of PYTHONPATH, or run `python -m benchmarks ...` in {root}"
        )
    return int(importlib.import_module("benchmarks.__main__").main(args.words))


class _Several(argparse.Action):
    """An option with several values that ends where a key=value begins, which argparse would take as one more of them.

    known: the words that may stand there; without it, whole numbers.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, known: Sequence[str] = (), help: str = ""
    ) -> None:
        super().__init__(option_strings, dest, nargs="+", metavar="|".join(known) or "N", help=help)
        self.known = known

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        words = [word for word in values if "=" not in word]
        namespace.loose = [
            *getattr(namespace, "loose", []),
            *(word for word in values if "=" in word),
        ]
        wrong = [
            word for word in words if not (word in self.known if self.known else word.isdecimal())
        ]
        if wrong or not words:
            needed = (
                f"one or more of {', '.join(self.known)}" if self.known else "whole numbers from 0"
            )
            raise argparse.ArgumentError(
                self, f"got {', '.join(wrong) or 'nothing'}, needs {needed}"
            )
        setattr(namespace, self.dest, words if self.known else [int(word) for word in words])


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Settings as key=value may stand anywhere behind the command; argparse alone takes them in one place."""
    parser = _parser()
    args, rest = parser.parse_known_args(words)
    loose = [
        *getattr(args, "loose", []),
        *(word for word in rest if "=" in word and not word.startswith("-")),
    ]
    unknown = [word for word in rest if word not in loose]
    if "=" in (
        getattr(args, "dataset", None) or ""
    ):  # the first positional word of `reproduce --resume DIR key=value`
        loose = [args.dataset, *loose]
        args.dataset = None
    if unknown or (loose and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or loose)}")
    if loose:
        args.overrides = [*args.overrides, *loose]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sssd-fast", description="Train SSSD-COVID fast on one limited GPU."
    )
    parser.add_argument("--version", action="version", version=f"sssd_fast {__version__}")
    every = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str, *, to: Any = every) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = to.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function, dry_run=False)
        return sub

    def trains(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--config",
            metavar="NAME|FILE",
            help="a shipped configuration (`sssd-fast configs`) or a YAML file",
        )
        sub.add_argument(
            "--init-norm",
            choices=("model", "imagenet", "half"),
            default="model",
            help="pixel mean and std the --init weights were trained with: this model's (default), ImageNet's (public MAE "
            "weights), or 0.5 each; the difference is folded into the patch projection, exactly",
        )
        sub.add_argument("--out", metavar="DIR", help="run folder to make (default runs/COMMAND)")
        sub.add_argument(
            "--resume",
            metavar="RUN",
            help="continue the run in this folder, with its configuration",
        )
        sub.add_argument(
            "--overwrite", action="store_true", help="replace an existing run in --out"
        )
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="check everything and train two steps; keeps nothing",
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    sub = command("run", commands.run, "pre-train, fine-tune, evaluate and report")
    trains(sub)
    several = sub.add_mutually_exclusive_group()
    several.add_argument(
        "--seeds",
        action=_Several,
        help="repeat with these seeds (training and split); mean and deviation",
    )
    several.add_argument(
        "--folds",
        action="store_true",
        help="repeat for every fold of data.folds; mean and deviation",
    )
    sub.add_argument(
        "--from-scratch", action="store_true", help="leave out pre-training: the supervised control"
    )

    sub = command(
        "reproduce", commands.reproduce, "the paper's experiment on a public CT set, with controls"
    )
    sub.add_argument("dataset", nargs="?", metavar="NAME", help="covid-ct or sars-cov-2-ct")
    sub.add_argument(
        "--data", metavar="DIR", help="folder of the set's images, in class folders at any depth"
    )
    sub.add_argument(
        "--protocols",
        action=_Several,
        known=("random", "controlled"),
        help="splits; random, the paper's, and both by default",
    )
    sub.add_argument(
        "--methods",
        action=_Several,
        known=("sssd", "mae", "supervised", "external"),
        help="default: all; external with --external alone",
    )
    sub.add_argument("--seeds", action=_Several, help="default 0 1 2 3 4")
    sub.add_argument(
        "--external",
        metavar="DIR",
        help="images to pre-train on too, without labels: the other set",
    )
    sub.add_argument(
        "--official-split", metavar="CSV", help="path,label,split of COVID-CT, if it is not in DIR"
    )
    sub.add_argument(
        "--part",
        choices=("test", "val"),
        help="images to evaluate on (default test); val to choose settings",
    )
    sub.add_argument(
        "--try",
        dest="tries",
        action="append",
        metavar="KEY=[A, B]",
        help="with --part val: settings to compare, in all combinations; may be repeated",
    )
    sub.add_argument(
        "--minutes", type=float, metavar="M", help="begin no further model after so many minutes"
    )
    sub.add_argument(
        "--config", metavar="NAME|FILE", help="default: the shipped one for the paper on this set"
    )
    sub.add_argument("--out", metavar="DIR", help="folder to make (default runs/NAME)")
    sub.add_argument(
        "--resume",
        metavar="DIR",
        help="go on in this folder; seeds, methods and protocols may be added",
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="two steps of each stage for one seed; keeps nothing"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    sub = command("pretrain", commands.pretrain, "pre-train SSSD without labels")
    sub.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start from these weights (MAE .pth, Hugging Face, timm, a checkpoint)",
    )
    trains(sub)
    for name, function, text in (
        ("finetune", commands.finetune, "fine-tune a classifier and evaluate it"),
        ("probe", commands.probe, "linear probe of a frozen encoder"),
    ):
        sub = command(name, function, text)
        sub.add_argument(
            "--init",
            metavar="RUN|WEIGHTS",
            required=name == "probe",
            help="pre-training run, checkpoint, or foreign weights",
        )
        sub.add_argument(
            "--part",
            default="test",
            choices=("train", "val", "test"),
            help="part to evaluate at the end",
        )
        trains(sub)

    sub = command(
        "evaluate", commands.evaluate, "evaluate a fine-tuned run again, or on another part"
    )
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--part", default="test", choices=("train", "val", "test"))
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    sub = command("predict", commands.predict, "score images with a fine-tuned model")
    sub.add_argument("model", metavar="RUN|CHECKPOINT")
    sub.add_argument("images", nargs="+", metavar="IMAGE|DIR")
    sub.add_argument("--out", default="predictions.csv", metavar="FILE")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    sub.add_argument("--batch-size", type=int, default=64)

    data = command("data", None, "check, split, convert or generate image sets").add_subparsers(
        required=True, metavar="ACTION"
    )
    sub = command(
        "check",
        commands.data_check,
        "decode every image once; list bad files and duplicates",
        to=data,
    )
    sub.add_argument("source", metavar="DIR|CSV")
    sub.add_argument("--out", metavar="FILE.json", help="keep the index")
    sub.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="F")
    _manifest(sub)
    sub = command("split", commands.data_split, "write a split as CSV path,label,split", to=data)
    sub.add_argument("source", metavar="DIR|CSV|INDEX.json")
    sub.add_argument(
        "--protocol", default="random", help="random, block, patient, kfold, manifest or a CSV file"
    )
    sub.add_argument("--out", default="split.csv", metavar="FILE.csv")
    sub.add_argument("--test", type=float, default=0.2, metavar="F", help="fraction of all images")
    sub.add_argument(
        "--val", type=float, default=0.1, metavar="F", help="fraction of all images; 0 = none"
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--folds", type=int, default=5)
    sub.add_argument("--fold", type=int, help="one fold (from 0); without it kfold writes all")
    _manifest(sub)
    sub = command(
        "synthetic", commands.data_synthetic, "generate synthetic chest-CT-like slices", to=data
    )
    sub.add_argument("out", metavar="DIR")
    sub.add_argument("--count", type=int, default=1600)
    sub.add_argument("--size", type=int, default=96)
    sub.add_argument("--seed", type=int, default=0)
    sub = command(
        "convert",
        commands.data_convert,
        "CT volumes (DICOM, NIfTI) to a folder of grey PNG slices",
        to=data,
    )
    sub.add_argument(
        "source",
        metavar="DIR|CSV",
        help="one folder per class, or a CSV manifest of files and folders",
    )
    sub.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="new folder: CLASS/VOLUME/SLICE.png, manifest.csv",
    )
    sub.add_argument(
        "--manifest", metavar="CSV", help="path,label[,split][,patient], paths relative to DIR"
    )
    sub.add_argument(
        "--window",
        default="lung",
        metavar="W",
        help="lung (default: level -600, width 1500 HU), mediastinum (40, 400), --window=LEVEL,WIDTH, file (as each file "
        "says) or minmax (of each volume; for values that are not HU)",
    )
    sub.add_argument(
        "--every", type=int, default=1, metavar="N", help="keep each Nth slice of a volume"
    )
    sub.add_argument(
        "--size", type=int, metavar="PIXELS", help="resize until the shorter side has so many"
    )
    sub.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="F")

    sub = command("weights", commands.weights, "show how foreign weights fit a configuration")
    sub.add_argument("path", metavar="WEIGHTS|RUN")
    sub.add_argument("--config", metavar="NAME|FILE")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    sub = command("export", commands.export, "export an encoder or a classifier, outputs compared")
    sub.add_argument("model", metavar="RUN|CHECKPOINT")
    sub.add_argument("--format", required=True, choices=("timm", "huggingface", "torch", "onnx"))
    sub.add_argument("--out", required=True, metavar="FILE|DIR")
    sub = command("report", commands.report, "write report.md and report.html of a run again")
    sub.add_argument("run", metavar="RUN")
    sub = command("plan", commands.plan, "which micro-batch and settings fit a GPU, predicted")
    sub.add_argument(
        "--model", choices=("tiny", "small", "base", "large"), help="the ViT, as model.name"
    )
    sub.add_argument("--config", metavar="NAME|FILE", help="a shipped configuration or a YAML file")
    sub.add_argument(
        "--memory", required=True, metavar="SIZE", help="12GB, 11.5GiB, 8000MB; auto = the GPU here"
    )
    sub.add_argument("--task", default="pretrain", choices=("pretrain", "finetune"))
    sub.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="effective batch of a process (default: as configured)",
    )
    sub.add_argument("--json", action="store_true")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    sub = command(
        "profile",
        commands.profile,
        "where the time of a pre-training step goes, by part and as a whole",
    )
    sub.add_argument("--config", metavar="NAME|FILE", help="a shipped configuration or a YAML file")
    sub.add_argument(
        "--steps", type=int, default=10, metavar="N", help="steps that are measured (default 10)"
    )
    sub.add_argument(
        "--warmup", type=int, default=3, metavar="N", help="steps before them (default 3)"
    )
    sub.add_argument("--out", metavar="FILE.png", help="the breakdown as a picture")
    sub.add_argument(
        "--json", metavar="FILE.json", help="every figure, with command, versions and hardware"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    sub = command("bench", _bench, "measure speed and memory of this machine; needs a checkout")
    sub.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="WORDS", help="see `sssd-fast bench --help`"
    )
    sub = command(
        "doctor", commands.doctor, "what this machine has, what will be used, and why not the rest"
    )
    sub.add_argument("--json", action="store_true")
    sub = command(
        "configs", commands.configs, "list the shipped configurations, or print one with every key"
    )
    sub.add_argument("name", nargs="?")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def _manifest(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--manifest", metavar="CSV", help="path,label[,split][,patient], paths relative to DIR"
    )
    sub.add_argument(
        "--accept-wrong-extension",
        action="store_true",
        help="keep good images named as another format",
    )


if __name__ == "__main__":
    sys.exit(main())
