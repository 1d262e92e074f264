"""Write the CIFAR-10 feature network of shared/eval as an exported program, for `detailflow evaluate --features FILE.pt2`.

    python benchmarks/export_cifar10_features.py outputs/cifar10-features.pt2

It maps images (B, 3, 32, 32) in [-1, 1], for any B, to 256 features and 10 class logits. Any network that is exported as here
can be given: a program may also return the features alone.
"""

import argparse
import runpy
from pathlib import Path

import torch

NETWORK = Path(__file__).resolve().parents[2] / "shared" / "eval" / "cifar10_features.py"


def export(file: Path) -> None:
    """Write the program to `file`, which must end in .pt2."""
    network = runpy.run_path(str(NETWORK))["load"]()
    # Two images, as torch.export takes a batch of one for a constant.
    program = torch.export.export(network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    export(parser.parse_args().file)


if __name__ == "__main__":
    main()
