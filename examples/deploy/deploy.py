"""A deployment step: convert, gate on the exit code and on the numbers, and print what to ship.

    python examples/deploy/deploy.py -m MODEL --data-dir IMAGES -o OUT [--max-drop PTS] [--max-keep N]

It calls ``normswap convert --json`` as a pipeline would, reads the one JSON object on stdout, and ends with 0 only if
the folder may be shipped. The exit codes of convert are passed on: 4 means that a check failed and that nothing was
saved. To have the best model in spite of that, for somebody to look at, add ``--save-best`` to the command below.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--max-drop", default="1.0", help="points of top-1 that may be lost")
    parser.add_argument("--max-keep", default="4", help="LayerNorms that the target can afford")
    parser.add_argument("--repo-id", help="where it would go on the Hugging Face Hub")
    arguments, more = parser.parse_known_args()  # anything else is for normswap convert

    command = [sys.executable, "-m", "normswap_cli", "convert", "-m", arguments.model]
    command += ["--data-dir", arguments.data_dir, "-o", str(arguments.output)]
    command += ["--max-drop", arguments.max_drop, "--max-keep", arguments.max_keep, "--json", *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout) if done.stdout else None
    if done.returncode != 0:
        if report is not None:
            print(f"not shipped: top-1 {report['before']['top1']:.2f} -> {report['after']['top1']:.2f} %")
        return done.returncode

    # The exit code vouches for the fold and for the budget. What else matters to you, ask for here.
    problems = []
    if report["non_finite"]:
        problems.append(f"{report['non_finite']} images give an answer that is not finite")
    if report["fold_warning"]:
        problems.append(report["fold_warning"])
    if problems:
        print("not shipped: " + "; ".join(problems))
        return 1

    kept = f"{len(report['kept'])} LayerNorms stay: {', '.join(report['kept'])}" if report["kept"] else "no LayerNorm"
    print(f"ship {arguments.output}: top-1 {report['before']['top1']:.2f} -> {report['after']['top1']:.2f} %, {kept}")
    for path in sorted(arguments.output.iterdir()):
        print(f"  {path.name:<20} {path.stat().st_size:>12,} bytes")
    if arguments.repo_id:
        push = [sys.executable, "-m", "normswap_cli", "push", str(arguments.output), arguments.repo_id, "--dry-run"]
        return subprocess.run(push).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
