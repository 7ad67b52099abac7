"""Converts this project's docstrings to reStructuredText.

They are written for `help()`: Google's sections (Args, Returns, Raises, Attributes, Example), paragraphs that begin
with a label (Formula, Variables, Source), and code in single backticks as in Markdown.
"""

import re
from collections.abc import Callable

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example)( \([^)]*\))?:$")
LABELLED = re.compile(r"(Formulas?|Variables|Sources?)\b([^:]*): *")
ITEM = re.compile(r"(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*):(?: |$)")
# Code, emphasis, links, and characters that reStructuredText would take for markup.
INLINE = re.compile(
    r"`(?P<code>[^`]+)`|(?<!\w)\*(?P<emphasis>\w+(?: \w+)*)\*(?!\w)|arXiv:(?P<arxiv>\d+\.\d+)"
    r"|docs/(?P<page>\w+)\.md|(?P<markup>[\\*_|`])"
)
# An equation that the text begins with, that follows a colon, or that is alone on its line, has a line of its own on
# the page, together with the punctuation behind it.
EQUATION = re.compile(r"(?:\A|(?<=:\n)|^(?= *`[^`]+`[.,;:]? *$)) *`([^`]+ = [^`]+)`([.,;:]?)", re.M)
HEADINGS = {"Args": "Arguments"}

# Returns the public path of a name in a docstring, or None.
Resolve = Callable[[str], str | None]


def to_rst(lines: list[str], resolve: Resolve) -> list[str]:
    """Returns the lines of a docstring, without common indentation, as reStructuredText."""
    result: list[str] = []
    for block in _blocks(lines):
        first = block[0]
        if section := SECTION.match(first):
            result += _section(section[1], section[2] or "", _dedented(block[1:]), resolve)
        elif labelled := LABELLED.match(first):
            result += _labelled(labelled, "\n".join([first[labelled.end() :], *block[1:]]), resolve)
        elif first.startswith(" "):
            result += ["::", "", *block]
        else:
            result += inline("\n".join(block), resolve).split("\n")
        result.append("")
    return result


def inline(text: str, resolve: Resolve, *, formulas: bool = False) -> str:
    """Returns running text with its code, emphasis and links as reStructuredText writes them."""

    def replaced(match: re.Match[str]) -> str:
        if code := match["code"]:
            code = " ".join(code.split())
            page = re.fullmatch(r"docs/(\w+)\.md", code)
            target = resolve(code)
            if page:
                marked = f":doc:`{code} </{page[1]}>`"
            elif target:
                marked = f":py:obj:`{code} <{target}>`"
            else:
                marked = f":formula:`{code}`" if formulas else f"``{code}``"
        elif match["emphasis"]:
            marked = match[0]
        elif match["arxiv"]:
            marked = f"`{match[0]} <https://arxiv.org/abs/{match['arxiv']}>`__"
        elif match["page"]:
            marked = f":doc:`{match[0]} </{match['page']}>`"
        else:
            return f"\\{match[0]}"
        # Markup must be followed by a space or punctuation; an escaped space is not printed.
        return marked + ("\\ " if text[match.end() : match.end() + 1].isalnum() else "")

    return INLINE.sub(replaced, text)


def _blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs, and sections with all that is indented below their headings."""
    blocks: list[list[str]] = []
    in_section = at_start = False
    for line in lines:
        if not line.strip():
            at_start = True
            if in_section:
                blocks[-1].append("")
        elif SECTION.match(line):
            blocks.append([line])
            in_section, at_start = True, False
        elif in_section and line.startswith(" "):
            blocks[-1].append(line)
        elif at_start or in_section or not blocks:
            blocks.append([line])
            in_section = at_start = False
        else:
            blocks[-1].append(line)
    return blocks


def _section(name: str, condition: str, body: list[str], resolve: Resolve) -> list[str]:
    if name == "Example":
        return [".. rubric:: Example", "", ".. code-block:: pycon", "", *_indented(body)]
    heading = f":{HEADINGS.get(name, name)}{condition}:"
    if name == "Returns":
        return [heading, *_indented(inline("\n".join(body), resolve).split("\n"))]
    items: list[tuple[str, list[str]]] = []
    for line in body:
        if item := ITEM.match(line):
            items.append((item[1], [line[item.end() :]]))
        elif line.strip() and not items:
            raise ValueError(f"{name}: expected `name: text`, got {line!r}")
        elif line.strip():
            items[-1][1].append(line.strip())
    result = [heading]
    for names, text in items:
        result += _indented([", ".join(f"``{name}``" for name in names.split(", "))])
        result += _indented(_indented(inline("\n".join(text).strip(), resolve).split("\n")))
        result.append("")
    return result


def _labelled(label: re.Match[str], text: str, resolve: Resolve) -> list[str]:
    if label[1].startswith("Formula"):
        # Text, an equation, its punctuation, text, ...
        parts = [" ".join(part.split()) for part in EQUATION.split(text.lstrip())]
        marked = [inline(part, resolve, formulas=True) for part in parts[::3]]
        for number, (code, end) in enumerate(zip(parts[1::3], parts[2::3], strict=True)):
            marked[number] += f" :equation:`{code}{end}` "
        text = " ".join("".join(marked).split())
    else:
        text = inline(" ".join(text.split()), resolve)
    return [f".. container:: {label[1].lower().rstrip('s')}", "", f"   **{label[1]}**{label[2]}: {text}"]


def _indented(lines: list[str]) -> list[str]:
    return [f"   {line}" if line.strip() else "" for line in lines]


def _dedented(lines: list[str]) -> list[str]:
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [line[indent:] for line in lines]
