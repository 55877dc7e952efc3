"""The README's table: the demo model at 1, 2 and 5 minutes against n-grams, gzip and xz on the same held-out text.

    python scripts/compression_table.py [folder]

takes about ten minutes and leaves the runs in the folder (default runs/compression).
"""

import json
import subprocess
import sys
from pathlib import Path

from baselines import baselines

MINUTES = (1, 2, 5)


def main(folder: Path) -> None:
    rows = {}
    for minutes in MINUTES:
        run = folder / f"{minutes}-minutes"
        command = [sys.executable, "-m", "jaxllm.cli", "demo", "--minutes", str(minutes), "--out", str(run)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((run / "summary.json").read_text())
        name = f"demo model, {minutes} minute{'s' * (minutes > 1)} in all ({summary['tokens'] / 1e6:.2f} M tokens)"
        rows[name] = summary["bits_per_byte"]
    rows |= baselines(folder / f"{MINUTES[0]}-minutes")
    print("| | bits per byte |\n|---|---|")
    for name, bits in rows.items():
        print(f"| {name} | {bits:.3f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compression"))
