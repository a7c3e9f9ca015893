"""Figures show themselves in a notebook, in a process that never imported pyplot."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_picture_shows_itself_without_pyplot():
    code = """
import sys
from fedlora_mini.data import gallery, load
picture = gallery(load("phantom", size=32, sites=2, per_site=4, val=2, test=2), per_site=2)
assert "matplotlib.pyplot" not in sys.modules
assert picture._repr_png_().startswith(b"\\x89PNG")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
