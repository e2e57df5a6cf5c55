"""Docstrings to prose: what is kept, what is left out, and that templates are recognised as one text."""

import argparse
import ast
import inspect
import textwrap
from pathlib import Path

import numpy.linalg._linalg

from data_tools import pydocs

NUMPY_STYLE = """Fit the model to the training data.

    The model is fitted by minimising the squared error over all the samples, as in [1]_. See
    :func:`numpy.linalg.solve` for the routine that is used:

    >>> solve(a, b)
    array([1, 2])

    Parameters
    ----------
    samples : array-like of shape (n, m)
        The training samples, one in each row, which must not contain any missing values at all.
    verbose : bool
        Be verbose.

    Notes
    -----
    Convergence is slow when the columns are **nearly** dependent; then a `ridge` penalty helps.

    References
    ----------
    .. [1] Somebody, "A title of a paper that would otherwise read like a sentence.", 1999.
    """

GOOGLE_STYLE = """Opens a connection to the server.

    Args:
        host (str): The name of the host that the connection should be opened to by the client.
        port: A number.

    Returns:
        The connection, which has to be closed by the caller when it is not needed any more.

    Example::

        connection = open("host")

    .. note::
        A connection that was closed by the server can not be used again for other requests.

    :param timeout: How long the client waits for the server before it gives up, in seconds.
    | a | table |
    """


def test_numpy_style() -> None:
    assert pydocs.paragraphs(inspect.cleandoc(NUMPY_STYLE)) == [
        "Fit the model to the training data.",
        "The model is fitted by minimising the squared error over all the samples, as in.",
        "The training samples, one in each row, which must not contain any missing values at all.",
        "Convergence is slow when the columns are nearly dependent; then a ridge penalty helps.",
    ]


def test_google_and_sphinx_style() -> None:
    assert pydocs.paragraphs(inspect.cleandoc(GOOGLE_STYLE)) == [
        "Opens a connection to the server.",
        "The name of the host that the connection should be opened to by the client.",
        "The connection, which has to be closed by the caller when it is not needed any more.",
        "A connection that was closed by the server can not be used again for other requests.",
        "How long the client waits for the server before it gives up, in seconds.",
    ]


def test_code_is_not_prose() -> None:
    for text in (
        "x = f(y) + 1 is what it does to the a and the b.",
        "Foo_bar, BazQux(1), a.b.c and the d_e.",
        "No full stop at all",
    ):
        assert not pydocs.paragraphs("A summary that ends here.\n\n" + text)[1:], text


def test_templates_are_one_text() -> None:
    same = pydocs.paragraph_identity("Constructs a BertModel with 12 layers from the given configuration.")
    assert same == pydocs.paragraph_identity("Constructs a GPT2Model with 24 layers from the given configuration!")
    assert same != pydocs.paragraph_identity("Constructs a BertModel with 12 heads from the given configuration.")


def test_finds_the_docstrings_that_the_parser_finds() -> None:
    """The lexical scan against `ast` on real sources, for docstrings long enough to matter."""
    for module in (argparse, inspect, textwrap, numpy.linalg._linalg):
        source = Path(module.__file__ or "").read_text()
        scanned = {text for _, text in pydocs.docstrings(source)}
        parsed = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 120:
                    parsed.add(text)
        assert parsed
        assert parsed <= scanned, module


def test_quotes_in_strings_and_comments_do_not_open_a_docstring() -> None:
    text = "This text is long enough to be looked at, since it has more than sixty characters."
    lines = [f'"""{text}"""', 'x = \'"""\'  # it\'s """ here', "def f():  # why", f'    r"""{text} \\d"""']
    source = "\n".join([*lines, f'    y = """{text}"""\n'])
    assert [found for _, found in pydocs.docstrings(source)] == [text, text + " \\d"]
    assert [line for line, _ in pydocs.docstrings(source)] == [1, 4]
