"""`python tests/fuzz`: see the package."""

import argparse
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # as this folder is run, not imported

from fuzz.runner import run_cases

ALL = 10_000


def main() -> int:
    """Run cases and list those that failed; 1 if any did."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description="Mutated inputs, each known by its number.")
    parser.add_argument("numbers", nargs="*", type=int, help="cases to run again, with all that they print")
    parser.add_argument("--first", type=int, default=0, help="the first case (default: 0)")
    parser.add_argument("--count", type=int, default=ALL, help="how many (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes at once (default: 1)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave the last case's files")
    args = parser.parse_args()
    numbers = args.numbers or range(args.first, args.first + args.count)

    started, slow, endings = time.monotonic(), [], Counter()
    failed: dict[str, list[int]] = defaultdict(list)
    for done, result in enumerate(run_cases(numbers, args.keep, args.workers), 1):
        for fault in result["faults"]:
            failed[fault].append(result["number"])
            if len(failed[fault]) == 1:
                print(f"case {result['number']}: {fault}\n    {ascii(result['argv'])[:300]}", flush=True)
        if args.numbers:
            show(result)
        endings[
            result["kind"], "failed" if result["faults"] else "refused" if result["status"] == 2 else "succeeded"
        ] += 1
        slow.append((result["seconds"], result["number"]))
        if done % 500 == 0:
            print(
                f"{done} cases, {sum(map(len, failed.values()))} faults, {time.monotonic() - started:.0f} s", flush=True
            )

    print(
        f"\n{len(slow)} cases in {time.monotonic() - started:.0f} s; slowest: ",
        *(f"{n} ({s:.1f} s)" for s, n in sorted(slow)[-5:]),
    )
    for kind in sorted({kind for kind, _ in endings}):
        print(
            f"  {kind:10}",
            *(f"{endings[kind, ending]} {ending}" for ending in ("succeeded", "refused", "failed")),
            sep="  ",
        )
    for fault, numbers in sorted(failed.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers):6} × {fault}: cases {', '.join(map(str, numbers[:8]))}")
    return 1 if failed else 0


def show(result: dict) -> None:
    """All of one case."""
    print(f"case {result['number']} ({result['kind']}): {result['argv']!a}")
    print(
        f"status {result['status']}, {result['seconds']:.1f} s, {result['peak'] / 2**20:.0f} MiB; "
        f"faults: {result['faults']}"
    )
    print(result.get("out", ""), result.get("err", ""), sep="\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
