"""What the command line says beside its results: help, and messages of one line each."""

import argparse
import logging
import warnings


def command_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Of a command; its help ends in `examples` as they are."""
    return argparse.ArgumentParser(
        prog=command,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def plain_messages() -> None:
    """Show warnings as lines of text; leave out the hints that others give their developers."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=module)
    for logger in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(logger).setLevel(logging.ERROR)
