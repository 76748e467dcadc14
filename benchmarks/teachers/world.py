"""Train the five small teachers of the small world from scratch, on one CPU thread.

Their images are scenes drawn by the project; nothing is downloaded. A teacher whose folder has a model card is
finished and is skipped: remove the folder, or give another --out, to train it again. An interrupted training
resumes from its scratch state in --work. All seeds are fixed: two runs on one machine give the same weights.

    python benchmarks/teachers/world.py --out shoulders/world/teachers --work runs/world [--only detector segmenter]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

# name of the teacher -> module beside this one whose train_world(out, work, steps) trains and saves it
TEACHERS = {
    "base": "world_base",
    "classifier": "world_classifier",
    "detector": "detection",
    "segmenter": "world_segmenter",
    "instances": "instances",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("shoulders/world/teachers"))
    parser.add_argument("--work", type=Path, default=Path("runs/world"), help="scratch states and drawn scenes")
    parser.add_argument("--only", nargs="+", choices=TEACHERS, default=list(TEACHERS), metavar="NAME")
    parser.add_argument("--steps", type=int, help="of each training; default: the number in its script")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        out = args.out / name
        if (out / "README.md").exists():
            print(f"{name}: finished, see {out / 'README.md'}", flush=True)
            continue
        print(f"{name}: training, scratch state in {args.work / name}", flush=True)
        # imported when it is needed: a detector needs scipy, a classifier does not
        importlib.import_module(TEACHERS[name]).train_world(out, args.work / name, args.steps)


if __name__ == "__main__":
    main()
