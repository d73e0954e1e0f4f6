"""The installed command, `cosa-fast train|evaluate|predict|prepare|report|export|demo ...`, and `python -m cosa_fast`.

Each is the door `python -m cosa_fast.NAME`.
"""

import importlib
import sys

from cosa_fast.cli import run_cli
from cosa_fast.errors import UserError, hint

COMMANDS = {
    "train": "train a network as a configuration file says",
    "evaluate": "mIoU of a checkpoint",
    "predict": "masks, overlays, pseudo-labels, CAMs of images",
    "prepare": "check a data set, and build its label file",
    "report": "a page of a run, or of several side by side",
    "export": "a network for other programs",
    "demo": "train on generated images: a few minutes on two CPU cores",
}
MODULES = {"report": "cosa_fast.report.__main__"}


def main(argv: list[str] | None = None) -> int:
    """Run the door that the first argument names with the others. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: cosa-fast COMMAND ...   (cosa-fast COMMAND --help says more)\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}{hint(name, COMMANDS)}; wanted one of {', '.join(COMMANDS)}")
    return importlib.import_module(MODULES.get(name, f"cosa_fast.{name}")).main(arguments[1:])


def run() -> int:
    """What the installed command calls."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(run())
