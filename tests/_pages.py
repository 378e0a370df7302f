"""README.md and docs/ as the tests read them: their fenced blocks, and the commands in these.

What a block is follows from its language:

- ``sh`` and ``bash`` run, and must succeed;
- ``console`` holds commands after ``$`` and what they print, which is compared: a number stands for any number, ``...``
  or ``[...]`` for anything, and space does not count;
- ``python`` runs as a script of its own;
- ``json``, ``toml`` and ``yaml`` are parsed, with ``...`` left out;
- ``text`` is only read.

A ``title="FILE"`` makes the block that file instead, for later blocks to use. Comments on the line above say otherwise:

- ``<!-- not run: WHY -->``: checked, not run;
- ``<!-- long: PATHS -->``: takes minutes, so only under ``-m long``; else the paths are put there from the quickstart;
- ``<!-- given: PATHS -->``, for a page: it begins with these of the quickstart's results.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "docs" / "index.md"
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

LANGUAGES = {"sh", "bash", "console", "python", "json", "toml", "yaml", "text"}
_LAUNCHERS = {"env", "exec", "nice", "nohup", "python", "srun", "time", "timeout", "torchrun"}
_KEYWORDS = {"!", "do", "elif", "else", "if", "then", "until", "while"}
_COMMENT = re.compile(r"<!-- *(given|long|not run)(?:: *(.*?))? *-->")
_NUMBER = re.compile(r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it is, and what the comment above it says."""

    page: Path
    line: int
    language: str
    title: str | None
    code: str
    mark: str | None = None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"

    @property
    def paths(self) -> list[str]:
        """The quickstart's results that stand in for what a long block makes."""
        return self.why.split() if self.mark == "long" else []


def blocks(page: Path) -> list[Block]:
    """A page's blocks, in order."""
    found, comment = [], None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        assert token.type != "code_block", f"{page}:{token.map[0] + 1}: an indented block: fence it, with its language"
        if token.type == "html_block":
            comment = _COMMENT.fullmatch(token.content.strip())
        elif token.type == "fence":
            language, _, rest = token.info.strip().partition(" ")
            title = re.fullmatch(r'title="(.+)"', rest.strip()) if rest else None
            mark, why = (comment[1], comment[2] or "") if comment and comment[1] != "given" else (None, "")
            found.append(Block(page, token.map[0] + 1, language, title and title[1], token.content, mark, why))
            assert language in LANGUAGES, f"{found[-1]}: its language is {language!r}, not of {sorted(LANGUAGES)}"
            assert mark != "not run" or why, f"{found[-1]}: say why it is not run"
            comment = None
        else:
            comment = None
    return found


def given(page: Path) -> list[str]:
    """The quickstart's results that a page begins with."""
    comments = _COMMENT.finditer(page.read_text(encoding="utf-8"))
    return [path for comment in comments if comment[1] == "given" for path in comment[2].split()]


def parts(block: Block) -> list[tuple[str, str]]:
    """A console block's commands, each with what it is shown to print."""
    found: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n", " ", block.code).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            assert found, f"{block}: a console block begins with $ and a command"
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def script(block: Block) -> str:
    """A block's shell commands, without prompts and output."""
    return "\n".join(command for command, _ in parts(block)) if block.language == "console" else block.code


def shows(shown: str, printed: str) -> bool:
    """Whether ``printed`` is what a page shows, in which numbers and ``...`` stand for others."""
    pieces = re.split(r"\[?\.\.\.\]?", shown)
    pattern = ".*".join(re.escape(_plain(piece)) for piece in pieces)
    return re.search(pattern, _plain(printed), re.DOTALL) is not None


def _plain(text: str) -> str:
    """Without space, figures, the length of rules, or what says that a figure is one."""
    text = re.sub(r"\bthreads\b", "thread", re.sub(r"\x1b\[[0-9;]*m", "", text))
    return re.sub(r"\s+", "", re.sub(r"[─━]+", "─", _NUMBER.sub("#", text)))


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every ``ensembler`` that shell commands call: by path, after ``&&`` or ``do``, by torchrun."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"<<-? *['\"]?(\w+)['\"]?.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)  # here-documents
    for line in text.replace("$(which ensembler)", "ensembler").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        begins, launched, arguments = True, False, None
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[();<>|&]+", word):
                if arguments is not None:
                    yield arguments
                begins, launched, arguments = True, False, None
            elif arguments is not None:
                arguments.append(word)
            elif (begins or launched) and word.rpartition("/")[2] in ("ensembler", "ensembler.cli"):
                arguments = []
            elif begins:
                launched = word in _LAUNCHERS
                begins = word in _KEYWORDS or re.match(r"\w+=", word) is not None


def spans(page: Path) -> Iterator[list[str]]:
    """The words of every code span of a page's text that begins with ``ensembler`` or with one of its commands."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            words = child.content.split() if child.type == "code_inline" else []
            if words[:1] == ["ensembler"]:
                yield words[1:]
            elif words and re.fullmatch("train-[a-z-]+", words[0]):
                yield words


def check_command(arguments: list[str], group: Any) -> None:
    """Have the command line itself parse the arguments, up to where the command would run.

    A variable of the shell stands for 1. What reads files while options are parsed (``--config``, ``--resume``) does
    not happen.
    """
    words = [re.sub(r"\$(\w+|\{\w+\}|\(.*\))", "1", word) for word in arguments]
    command: Any = group
    context = None
    while hasattr(command, "commands"):
        if not words or words[0] in ("--help", "--version"):
            return
        context = command.context_class(command, info_name=words[0], parent=context)
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    if words != ["--help"]:
        for parameter in command.params:
            parameter.callback = None
        command.make_context(command.name, words, parent=context)


def check_span(words: list[str], group: Any) -> None:
    """Whether the command and its options exist; values are left alone, as ``N`` may stand for one."""
    command: Any = group
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name.isupper():  # COMMAND
            return
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        option = word.split("=")[0].rstrip(".,;:")
        assert not option.startswith("--") or option in options | {"--help"}, f"{name} has no option {option}"
