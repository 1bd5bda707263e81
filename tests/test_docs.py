"""The documentation: it builds without a warning, has every public name, and what it names exists. (Its code runs as
doctests: pyproject.toml.)"""

import contextlib
import doctest
import importlib
import io
import os
import re
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest

import cattn
import cattn.reference

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCS = ROOT / "docs"
if not DOCS.exists():
    pytest.skip("an installation without docs", allow_module_level=True)
TEXTS = {path: path.read_text() for path in [*sorted(DOCS.glob("*.md")), ROOT / "README.md"] if path.exists()}
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the HTML. Any warning fails it: a reference to nothing, a docstring that is no reST."""
    for module in ("sphinx", "myst_parser", "furo", "sphinx_copybutton", "matplotlib"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-d", folder / "doctrees", DOCS,
         folder / "html"],
        env=os.environ | {"PYTHONPATH": str(Path(cattn.__file__).parents[1])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def inventory(path):
    """{name: type} of Sphinx's objects.inv: four lines of text, then compressed ones, of a name and its type first."""
    *_, compressed = path.read_bytes().split(b"\n", 4)
    lines = zlib.decompress(compressed).decode().splitlines()
    return dict(re.match(r"(\S+) (\S+)", line).groups() for line in lines)


def test_every_public_name_is_in_the_reference(built):
    found = inventory(built / "objects.inv")
    others = "plots", *(f"integrations.{name}" for name in ("dask", "huggingface", "onnx", "torch"))
    modules = [cattn, cattn.reference, *(importlib.import_module(f"cattn.{name}") for name in others)]
    names = [f"{module.__name__}.{name}" for module in modules for name in module.__all__]
    assert len(names) > 15
    assert [name for name in names if name not in found] == []
    for layer in ("MultiHeadAttention", "PositionalEncoding"):
        assert found[f"cattn.{layer}.__call__"] == "py:method"


def test_signatures_are_short(built):
    """Names and defaults: of the overloads none, of the annotations nothing."""
    text = re.sub("<[^>]*>", "", (built / "api.html").read_text())
    assert len(re.findall(r"scaled_dot_product_attention\(query, key, value, attn_mask=None", text)) == 3
    assert not re.search(r"ArrayLike|Literal\[|np\.ndarray|numpy\.ndarray", text)


def test_pages_are_short():
    long = {path.name: len(path.read_text().splitlines()) for path in DOCS.glob("*.md")}
    assert [name for name, lines in long.items() if lines > 250] == []


def functions(path):
    return set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))


def test_pages_name_tests():
    """Those that hold the promises; `test_file.py: test_a` is one of that file."""
    files = {path.stem: functions(path) for path in TESTS.glob("test_*.py")}
    scripts = {"test_aarch64", "test_avx512", "test_integrations"}  # in tools/
    everything = set(files).union(*files.values()) | scripts
    named = {(page.name, name) for page, text in TEXTS.items() for name in re.findall(r"\btest_[a-z0-9_]+\b", text)}
    assert len({name for _, name in named}) > 40
    assert [pair for pair in sorted(named) if pair[1] not in everything] == []
    of_files = [(page.name, *match) for page, text in TEXTS.items()
                for match in re.findall(r"`(test_\w+)\.py:\s+(test_\w+)`", text)]
    assert len(of_files) > 20
    assert [found for found in of_files if found[2] not in files[found[1]]] == []


def slugs(text):
    """What the headings of a page are called in a link, as GitHub and MyST make it."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links():
    """What is not on the web is there: pages, their sections, pictures."""
    broken, count = [], 0
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text)):
            if target.startswith("https://"):
                continue
            count += 1
            file, _, section = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            if not there.exists() or (section and section not in slugs(there.read_text())):
                broken.append((page.name, target))
    assert count > 20
    assert broken == []


def test_pictures_are_shown():
    """Each that is made is on a page."""
    names = [path.name for path in DOCS.glob("pictures/*.png")]
    assert len(names) > 5
    assert [name for name in names if not any(f"pictures/{name}" in text for text in TEXTS.values())] == []


@pytest.fixture
def pictures(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("pictures")


def names_of(page):
    """What the code of a page has defined."""
    names = {}
    for example in doctest.DocTestParser().get_examples((DOCS / page).read_text()):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(example.source, page, "single"), names)
    return names


def test_the_picture_of_weights_is_that_of_its_page(pictures):
    np.testing.assert_allclose(pictures.weights_by_example(), names_of("attention.md")["weights"], rtol=1e-12)


def test_the_picture_of_scales_is_that_of_its_page(pictures):
    largest, of_scores = pictures.rows(512, 1)
    np.testing.assert_array_equal((largest, of_scores), names_of("training.md")["unscaled"][:2])


def test_the_tests_install_what_the_docs_need():
    """So that a build that warns fails them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["test"])
