"""What the command lines of this project share: parsing, notes, exit status."""

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache

from tqdm import tqdm

from .files import Output, out_of_memory


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse itself prints many lines of usage and exits
        raise ValueError(f"{message}; see {self.prog} --help")


def side(text: str) -> int:
    """Return a number of pixels. The models' own units are multiples of 8."""
    if not (text.isdecimal() and int(text) and int(text) % 8 == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; use multiples of 8, such as 512")
    return int(text)


def picture_size(text: str) -> tuple[int, int]:
    """Return width and height of "512x768", or of "512"."""
    width, height = (text.split("x", 1) * 2)[:2]
    return side(width), side(height)


def exit_status(command: Callable[[], int | None], name: str = "textinv") -> int:
    """Run a command; return its status, or 2 with one line on standard error for a user's mistake,
    or 130 after Ctrl-C. Warnings become notes, each printed once. Lines begin with `name`."""
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        say = cache(lambda text: tqdm.write(f"note: {text}", file=sys.stderr))
        warnings.showwarning = lambda message, *_: say(str(message))
        try:
            return command() or 0
        except (ValueError, OSError) as error:
            reason = str(error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            reason = "out of memory; what helps: --precision bf16, a smaller -n, --size or "
            reason += "--batch-size, --gradient-checkpointing, --preview-every 0, --device cpu"
        except KeyboardInterrupt:
            print(f"{name}: stopped", file=sys.stderr)
            return 130
        print(f"{name}: {' '.join(reason.split())}", file=sys.stderr)
        return 2
