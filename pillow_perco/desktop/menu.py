"""What the menu entries run: `perco convert`, each file to its own folder, and a notice where nobody sees stderr."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path


def convert_beside(files: Sequence[Path], to: str, bpp: str | None) -> Iterator[str]:
    """Converts files, those of one folder together; yields what went wrong."""
    absolute = sorted(file.absolute() for file in files)
    for folder, members in groupby(absolute, key=lambda file: file.parent):
        # -P: modules are not looked for in the current folder, where there may be anything.
        command = [sys.executable, "-P", "-m", "pillow_perco.cli", "convert", "--skip-existing", "--to", to]
        command += ["--bpp", bpp] if bpp else []
        run = subprocess.run(
            [*command, "--", *map(str, members), str(folder)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            # What click says before it, of usage, is of no use where nobody has typed a command.
            said = re.split("^Error: ", run.stderr, flags=re.MULTILINE)[-1].strip()
            text = said or f"perco convert ended with status {run.returncode}"
            notify(text)
            yield text
        elif skipped := re.search(r"(\d+) skipped", run.stdout):
            notify(f"{skipped[1]} of the files to write are there already, and stay as they are")


def notify(text: str) -> None:
    """Shows a text on the desktop, where there is one that can."""
    if command := shutil.which("notify-send"):
        shown = [command, "--icon=image-x-generic", "--", "PerCo", text[-1000:]]
        subprocess.run(shown, check=False, capture_output=True)
