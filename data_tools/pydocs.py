"""English prose from docstrings: the corpus `pydocs:` that is on every machine with Python packages.

Sources are scanned as text and never imported. A docstring becomes a document when, without its code, tables,
parameter lists and markup, enough running prose is left. Order and keys depend on the installed files alone.
"""

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

MIN_WORDS = 30
"""A document needs so many words of prose."""
MIN_DEFINITION_WORDS = 12
"""The description of a parameter counts as prose from so many words on; shorter ones are fragments."""

_SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def python_files() -> list[tuple[str, Path]]:
    """(path relative to its root, file) of every source of the running interpreter's packages and standard library."""
    roots = [Path(p) for p in [sysconfig.get_paths()["stdlib"], *sys.path] if Path(p).is_dir()]
    roots = [r for i, r in enumerate(roots) if r not in roots[:i] and (i == 0 or r.name.endswith("-packages"))]
    found: dict[str, Path] = {}
    for root in roots:
        stack = [root]
        while stack:
            for entry in sorted(stack.pop().iterdir()):
                if entry.is_dir():
                    if entry.name not in _SKIPPED_FOLDERS and not entry.is_symlink():
                        stack.append(entry)
                elif entry.suffix == ".py" and not entry.name.startswith("test_"):
                    found.setdefault(entry.relative_to(root).as_posix(), entry)
    return sorted(found.items())


# Comments and strings, so that a quote inside one of them does not open another. Parsing with `ast` finds the
# same docstrings a hundred times slower (100 s for the packages of a training environment).
_LEXEMES = re.compile(
    r"""#[^\n]*+|(?P<prefix>\b[rRuUbBfF]{1,2})?(?:(?P<long>\"{3}[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*+\"{3}"""
    r"""|'{3}[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+'{3})"""
    r"""|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|'[^'\\\n]*+(?:\\.[^'\\\n]*+)*+')""",
    re.S,
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line number, cleaned-up text) of each triple-quoted string that stands where a docstring can stand."""
    line, counted = 1, 0
    for match in _LEXEMES.finditer(source):
        literal, prefix = match.group("long"), (match.group("prefix") or "").lower()
        if literal is None or len(literal) < 60 or "b" in prefix or "f" in prefix:
            continue
        before = source[max(0, match.start() - 400) : match.start()]
        code = before.rstrip()
        last_line = re.sub(r"\s+#.*$", "", code[code.rfind("\n") + 1 :])
        starts_line = not before[before.rfind("\n") + 1 :].strip()
        if not starts_line or not (last_line.endswith(":") or not last_line or last_line.startswith("#")):
            continue
        body = literal[3:-3]
        if "\\" in body and "r" not in prefix:
            try:
                body = ast.literal_eval(literal)
            except (SyntaxError, ValueError):
                continue
        line += source.count("\n", counted, match.start())
        counted = match.start()
        yield line, inspect.cleandoc(body.expandtabs())


# --- blocks: which lines are prose -------------------------------------------------------------------------------

_PROSE_SECTIONS = frozenset(
    "notes note explanation description overview introduction warning warnings details discussion summary background "
    "motivation abstract tip important caution remarks".split()
)
_DEFINITION_SECTIONS = frozenset(
    "parameters args arguments attributes kwargs returns return yields raises options inputs outputs".split()
) | {"other parameters", "keyword arguments", "keyword args"}
_ITEM = re.compile(r"^[\w*`., ]{1,60}(?:\(.*?\))?\s?:\s+([A-Z].*)$")
_PLAIN_ITEM = re.compile(r"[A-Z][a-z]* [a-z](?!.* : )")
_FIELD_TEXT = re.compile(r"^\s*[:@](?:param|parameter|arg|argument|key|keyword|returns?|raises?)\b[^:]*:\s+(.*)$")
_UNDERLINE = re.compile(r"^\s*([=\-~^\"'*#+.`_])\1{2,}\s*$")
_GOOGLE_SECTION = re.compile(r"^\s*\**([A-Z][A-Za-z]*(?: [A-Za-z]+){0,2})\**\s*::?\s*$")
_FIELD = re.compile(r"^\s*(?::[a-z]\w*(?: [^:\n]*)?:(?!`)|@[a-z]+(?: [^:\n]+)?:|\\[a-z]+ )", re.I)
_DIRECTIVE = re.compile(r"^\s*\.\.(?:\s+([\w-]+)::|\s|$)")
_BULLET = re.compile(r"^\s*(?:[-*+•o]|\(?\d{1,2}[.)]|\(?[a-zA-Z][.)]|#\.|\[\d+\])\s+\S")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _words(lines: list[str]) -> int:
    return sum(len(line.split()) for line in lines)


def _definitions(lines: list[str]) -> Iterator[list[str]]:
    """Descriptions of a section's items (`name : type` above deeper lines, or `name (type): text`), a block each."""
    body = textwrap.dedent("\n".join(lines)).split("\n")
    block: list[str] = []
    skipping = False
    for line in [*body, "end"]:
        text = line.strip()
        if text and not line.startswith(" "):  # a new item
            if _words(block) >= MIN_DEFINITION_WORDS:
                yield block
            item = _ITEM.match(line)
            if item:
                block = [item.group(1)]
            else:  # Google's "Returns:" holds plain text
                block = [line] if _PLAIN_ITEM.match(line) else []
            skipping = False
        elif not text or _BULLET.match(line) or _DIRECTIVE.match(line) or text.startswith((">>>", "```")) or skipping:
            if _words(block) >= MIN_DEFINITION_WORDS:
                yield block
            block, skipping = [], bool(text)
        else:
            block.append(text)


class _Blocks:
    """Runs of lines at the outer indentation that may be prose; everything that is clearly not prose is left out.

    An empty list in `found` says that something was left out at this place.
    """

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.number = 0
        """Of the line to be read next."""
        self.base = 0
        """Indentation of the prose at this place."""
        self.skipping = False
        """Inside a section that is not prose."""
        self.block: list[str] = []
        self.found: list[list[str]] = []
        takers = (self._blank, self._fence, self._heading, self._skipped, self._opening, self._construct, self._code)
        while self.number < len(self.lines):
            line = self.lines[self.number]
            following = self.lines[self.number + 1] if self.number + 1 < len(self.lines) else ""
            if not any(take(line, following) for take in takers):
                self.block.append(line)
                self.number += 1
        self._close()

    def _close(self, *, left_out: bool = False) -> None:
        if self.block:
            self.found.append(self.block)
        self.block = []
        if left_out:
            self.found.append([])

    def _skip_while(self, wanted: Callable[[str], object]) -> list[str]:
        """Go to the first line that is not wanted; the lines passed over."""
        start = self.number
        while self.number < len(self.lines) and wanted(self.lines[self.number]):
            self.number += 1
        return self.lines[start : self.number]

    def _blank(self, line: str, following: str) -> bool:
        if line.strip():
            return False
        self._close()
        if following.strip() and _indent(following) == 0:
            self.base = 0
        self.number += 1
        return True

    def _fence(self, line: str, following: str) -> bool:
        """``` to ```."""
        if not line.strip().startswith(("```", "~~~")):
            return False
        self._close(left_out=True)
        self.number += 1
        self._skip_while(lambda inside: not inside.strip().startswith(("```", "~~~")))
        self.number += 1
        return True

    def _heading(self, line: str, following: str) -> bool:
        """A title above a line of dashes: numpydoc's sections."""
        stripped = line.strip()
        if self.block or len(stripped) >= 70 or not _UNDERLINE.match(following) or _UNDERLINE.match(line):
            return False
        name = stripped.lower().rstrip(":")
        self.skipping = name not in _PROSE_SECTIONS
        self.base = 0
        self.number += 2
        self._close(left_out=True)
        if name in _DEFINITION_SECTIONS:
            end = self.number
            while end < len(self.lines) and not (
                self.lines[end].strip() and _UNDERLINE.match("".join(self.lines[end + 1 : end + 2]))
            ):
                end += 1
            self.found += _definitions(self.lines[self.number : end])
            self.number = end
        return True

    def _skipped(self, line: str, following: str) -> bool:
        self.number += self.skipping
        return self.skipping

    def _section(self, line: str, following: str) -> str:
        """The name of a Google section that this line opens."""
        opens = not self.block and (not following.strip() or _indent(following) > _indent(line))
        section = _GOOGLE_SECTION.match(line) if opens else None
        return section.group(1).lower() if section else ""

    def _opening(self, line: str, following: str) -> bool:
        """`Note:` or `.. note::`: what is indented below it is prose."""
        directive = _DIRECTIVE.match(line)
        name = ((directive and directive.group(1)) or self._section(line, following)).lower()
        if name not in _PROSE_SECTIONS or not line.strip().endswith(":"):
            return False
        self._close()
        self.number += 1
        self._skip_while(lambda below: not below.strip())
        self.base = _indent(self.lines[self.number]) if self.number < len(self.lines) else 0
        return True

    def _construct(self, line: str, following: str) -> bool:
        """A directive, a section or a field with what is indented below it; long descriptions in it are kept."""
        section = self._section(line, following)
        if not (_DIRECTIVE.match(line) or section or _FIELD.match(line)):
            return False
        self._close(left_out=True)
        here = _indent(line)
        self.number += 1
        below = self._skip_while(lambda inside: not inside.strip() or _indent(inside) > here)
        if section in _DEFINITION_SECTIONS:
            self.found += _definitions(below)
        elif field := _FIELD_TEXT.match(line):
            text = [field.group(1), *(inside.strip() for inside in below if inside.strip())]
            if _words(text) >= MIN_DEFINITION_WORDS:
                self.found.append(text)
        return True

    def _code(self, line: str, following: str) -> bool:
        """Examples, and lines that are indented otherwise than the prose around them."""
        other = _indent(line) != self.base and not self.block
        if not line.strip().startswith((">>>", "...", "$ ", "In [")) and not other:
            return False
        if _indent(line) < self.base:
            self.base = _indent(line)
            return True
        self._close(left_out=True)
        self._skip_while(lambda inside: inside.strip())
        return True


# --- inline markup and the taste for prose -----------------------------------------------------------------------

_INLINE = [
    (re.compile(r":(?:[a-z]+:)?[a-z-]+:`([^`<]*?)\s*<[^`>]*>`"), r"\1"),  # :class:`text <target>`
    (re.compile(r":(?:[a-z]+:)?[a-z-]+:`[~!.]?([^`]*)`"), r"\1"),  # :class:`target`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <url>`_
    (re.compile(r"!?\[([^\]\[]+)\]\((?:[^()\s]|\([^()]*\))*\)"), r"\1"),  # [text](url)
    (re.compile(r"\s*\[(?:\d+|#?[A-Za-z]+\d{2,4}[a-z]?|CR\d+)\]_?"), ""),  # [1]_
    (re.compile(r"\[(`[^`]+`)\]"), r"\1"),
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`]*)`_?"), r"\1"),
    (re.compile(r"(?<![\w*])(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"(?<!\w)_([A-Za-z][A-Za-z ]*)_(?!\w)"), r"\1"),
    (re.compile(r"\\ |\\(?=[*_`])"), ""),
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"[“”]|''|``"), '"'),
    (re.compile(r"\s*—\s*|\s+[–]\s+"), " - "),
    (re.compile(r"…"), "..."),
    (re.compile(r" ([.,;:!?)])(?=\s|$)"), r"\1"),
]  # fmt: skip
_MARKUP = re.compile(r"[`*\\\[]|[^\x00-\x7f]|''| [.,;:!?)]|\b_")
_NOT_PROSE = re.compile(r"[$=<>|^~@#{}\\]|https?:|www\.|::|:[a-z]+:|\bf\(x\)|\bTODO\b|\bFIXME\b|\bXXX\b|---|\.{4}")
_CODE_WORD = re.compile(r"\w_|_\w|\w\(|[\[\]=/+*%&]|[a-z][A-Z]|\w\.\w|\d[A-Za-z]|[A-Za-z]\d|^-|\d")
_PLAIN_DOTS = re.compile(r"^\W*(?:e\.g|i\.e|a\.k\.a|U\.S|\d+(?:\.\d+)?|and/or)\W*$")
_SENTENCE_END = re.compile(r"[.!?][\"')]*$")
_COMMON = frozenset(
    "the a an of to in is are be and or that this it for as with by on at from not if when which will can may should "
    "would was were has have had but its their they you your we our all any each one only then than so such there "
    "these those into no do does used use using".split()
)


def _clean(block: list[str]) -> str:
    text = " ".join(" ".join(block).split())
    if ":math:" in text:
        return ""
    if _MARKUP.search(text):
        for pattern, replacement in _INLINE:
            text = pattern.sub(replacement, text)
    if text.endswith("::"):
        text = text[:-1]
    return "" if _NOT_PROSE.search(text) else text


def _is_prose(text: str) -> bool:
    """Whether a paragraph reads like English: whole sentences, common words, little code."""
    if not text.isascii() or not _SENTENCE_END.search(text) or not re.match(r"[\"'(]?[A-Z]", text) or "`" in text:
        return False
    words = text.split()
    if len(words) < 5 or text.count("(") != text.count(")") or text.count('"') % 2:
        return False
    code = sum(1 for w in words if _CODE_WORD.search(w) and not _PLAIN_DOTS.match(w))
    common = sum(1 for w in words if w.lower().strip(".,;:()\"'") in _COMMON)
    capitals = sum(1 for w in words if w[0].isupper())
    return code <= 0.12 * len(words) and common >= 0.25 * len(words) and capitals <= 0.3 * len(words)


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of English prose in a docstring, each on one line, in order."""
    kept: list[str] = []
    first = True
    for block in _Blocks(docstring).found:
        if not block:
            continue
        is_first, first = first, False
        if len({_indent(line) for line in block}) > 1 or any(_BULLET.match(line) for line in block):
            continue
        text = _clean(block)
        if (is_first or len(block) == 1) and len(text.split()) >= 6 and re.match(r"[A-Z]", text) and text[-1].isalnum():
            text += "."  # a summary or an item without its full stop
        if text.endswith(":"):  # what it announces is not prose and was left out
            text = text[: max((m.end() for m in re.finditer(r"[.!?][\"')]*(?=\s+[A-Z])", text)), default=0)]
        if text and _is_prose(text):
            kept.append(text)
    return kept


def paragraph_identity(text: str) -> bytes:
    """Equal for paragraphs that differ only in names, numbers, case and punctuation, as templated docstrings do."""
    plain = (w for w in text.split() if not _CODE_WORD.search(w) and w[1:] == w[1:].lower())
    words = (re.sub(r"[^a-z]", "", w.lower()) for w in plain)
    return hashlib.blake2b(" ".join(w for w in words if w).encode(), digest_size=8).digest()


def read_file(relative: str, path: Path) -> list[tuple[str, int, list[str]]]:
    """(relative path, line, paragraphs) of a source file's docstrings that hold enough prose."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line, text in docstrings(source):
        prose = paragraphs(text)
        if _words(prose) >= MIN_WORDS:
            found.append((relative, line, prose))
    return found
