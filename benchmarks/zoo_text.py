"""More English sentences than flow_inputs has, to calibrate text encoders on: the docstrings of numpy, scipy and scikit-learn.

Judged is on flow_inputs' own sentences, which come from other texts; what both happen to have is left out.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.flow_inputs import TOKENS, _package, _sentences, passages, vocabulary, word_pieces

__all__ = ["mixed_passages"]

PACKAGES = ("numpy", "scipy", "sklearn")
# Passages of flow_inputs' own texts that there are for calibration; what is asked for beyond comes from docstrings.
OWN = 352


def mixed_passages(split: str, count: int) -> NDArray[np.int64]:
    """Token ids [count, TOKENS] as `passages` gives them; of the split calib_a those beyond OWN are of docstrings."""
    if split != "calib_a" or count <= OWN:
        return passages(split, count)
    more = _tokenised()
    if len(more) < count - OWN:
        raise ValueError(f"only {OWN + len(more)} of {count} passages for {split}")
    return np.concatenate([passages(split, OWN), np.array(more[: count - OWN], np.int64)])


@lru_cache(maxsize=1)
def _tokenised() -> list[list[int]]:
    """Passages of docstrings in a fixed random order."""
    known, sentences = set(_sentences()), _docstring_sentences()
    ids = vocabulary()
    rows: list[list[int]] = []
    tokens: list[int] = []
    for number in np.random.RandomState(1).permutation(len(sentences)):
        if sentences[number] in known:
            continue
        tokens += word_pieces(sentences[number], ids)
        if len(tokens) >= TOKENS - 2:
            rows.append([ids["[CLS]"], *tokens[: TOKENS - 2], ids["[SEP]"]])
            tokens = []
    return rows


def _docstring_sentences() -> list[str]:
    """Different sentences of 6 to 60 words, nearly all letters."""
    found: dict[str, None] = {}
    for file in (file for package in PACKAGES for file in sorted(_package(package).rglob("*.py"))):
        for text in _docstrings(file):
            for paragraph in re.split(r"\n\s*\n", text):
                plain = re.sub(r"\s+", " ", re.sub(r"[*`|_=~^<>]+", " ", paragraph)).strip()
                for sentence in re.split(r"(?<=[a-z)][.!?]) (?=[A-Z])", plain):
                    letters = sum(char.isalpha() or char == " " for char in sentence)
                    if (
                        6 <= len(sentence.split()) <= 60
                        and sentence[0].isupper()
                        and sentence[-1] in ".!?"
                        and letters > 0.85 * len(sentence)
                    ):
                        found[sentence] = None
    return list(found)


def _docstrings(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
