"""Measure cattn against its peers: `python -m bench`. Exit status 1 when a result is wrong or an implementation fails."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import cattn

from . import probes, report, runner
from .peers import PEERS
from .workloads import WORKLOADS

NAMES = [work.name for work in WORKLOADS] + list(probes.PROBES)


def names(choices):
    """An argparse type: NAME,NAME,... out of the choices, or all."""

    def parse(text):
        chosen = list(choices) if text == "all" else text.split(",")
        for name in chosen:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"expected all or some of {','.join(choices)}, got {name!r}")
        return chosen

    return parse
