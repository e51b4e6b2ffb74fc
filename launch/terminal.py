"""What the command line says beside its results: this project's messages, one line each."""

import logging
import warnings


def plain_messages() -> None:
    """Show warnings as lines of text; leave out the hints that others give their developers."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=module)
    for logger in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(logger).setLevel(logging.ERROR)
