"""The arguments that train.py and distill.py share. Imports nothing that takes time, so that --help need not wait."""

import argparse


def training(description: str | None) -> argparse.Namespace:
    """Parses the command line: `config`, `resume` and `overrides`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt, if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.batch_size=8")
    return parser.parse_intermixed_args()
