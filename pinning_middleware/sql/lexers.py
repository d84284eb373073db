"""How each database separates words from quoted text and comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

UNKNOWN_STATEMENT: Final = "CALL"  # represents an unknown statement

_SINGLE, _DOUBLE = (re.compile(rf"{q}(?:[^{q}]++|{q}{q})*+{q}") for q in "'\"")
_SINGLE_ESCAPED, _DOUBLE_ESCAPED = (
    re.compile(rf"{q}(?:[^{q}\\]++|\\.|{q}{q})*+{q}", re.DOTALL) for q in "'\""
)
_BACKTICKS: Final = re.compile(r"`[^`]*+`")
_BRACKETS: Final = re.compile(r"\[[^\]]*+\]")
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
_TAG: Final = re.compile(r"\$(?:[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*+)?\$")
# A PostgreSQL literal continues on the next line, where the E of its first part still applies.
_CONTINUED: Final = re.compile(
    r"(?:[ \t\f\v]|--[^\r\n]*+)*+[\r\n](?:[ \t\f\v\r\n]|--[^\r\n]*+[\r\n])*+(?=')"
)


class Lexer(NamedTuple):
    """How a database separates words from quoted text and comments."""

    opening: re.Pattern[str]  # the beginning of a quoted text or a comment
    quoted: Mapping[str, re.Pattern[str]]  # quote → the whole quoted text
    line_end: re.Pattern[str]  # where a line comment ends
    nested_comments: bool = False
    executed_comments: bool = False  # MySQL executes /*! ... */
    string_prefixes: bool = False  # PostgreSQL's E'', U&'' and dollar quotes

    def bare(self, sql: str, kept_names: frozenset[str]) -> tuple[str, bool]:
        """
        Return the statement without comments and with an X for each quoted text, and whether
        every comment and quoted text is terminated. Quoted names stay if they are in `kept_names`:
        those of functions, whose effect does not depend on the quotes.
        """
        kept, at = [], 0
        while found := self.opening.search(sql, at):
            start, opening = found.start(), found[0]
            kept.append(sql[at:start])
            if opening in ("--", "#"):
                at = self.line_end.search(sql, start).start()  # type: ignore[union-attr]
                kept.append(" ")
            elif opening == "/*":
                if self.executed_comments and sql.startswith(("!", "M!"), start + 2):
                    kept.append(f";{UNKNOWN_STATEMENT};")
                at = self._comment_end(sql, start + 2)
                kept.append(" ")
            elif opening == "$":
                at = self._dollar_quote_end(sql, start)
                kept.append("$" if at == start + 1 else " X ")
            else:
                at = self._quoted_end(sql, start)
                name = sql[start + 1 : at - 1].upper() if opening != "'" else ""
                kept.append(f" {name if name in kept_names else 'X'} ")
            if at <= start:
                return "".join(kept), False
        kept.append(sql[at:])
        return "".join(kept), True

    def _quoted_end(self, sql: str, start: int) -> int:
        pattern = self.quoted[sql[start]]
        escaped = False
        if self.string_prefixes and sql[start] == "'":
            if escaped := _has_prefix(sql, start, "E"):
                pattern = _SINGLE_ESCAPED
            elif _has_prefix(sql, start, "U&"):
                pattern = _SINGLE
        found = pattern.match(sql, start)
        while found and escaped and (gap := _CONTINUED.match(sql, found.end())):
            found = pattern.match(sql, gap.end())
        return found.end() if found else 0

    def _dollar_quote_end(self, sql: str, start: int) -> int:
        tag = _TAG.match(sql, start)
        if tag is None or _in_word(sql, start):
            return start + 1
        end = sql.find(tag[0], tag.end())
        return end + len(tag[0]) if end >= 0 else 0

    def _comment_end(self, sql: str, at: int) -> int:
        if not self.nested_comments:
            end = sql.find("*/", at)
            return end + 2 if end >= 0 else 0
        depth = 1
        for edge in _COMMENT_EDGE.finditer(sql, at):
            depth += 1 if edge[0] == "/*" else -1
            if not depth:
                return edge.end()
        return 0


def _in_word(sql: str, at: int) -> bool:
    return at > 0 and (sql[at - 1].isalnum() or sql[at - 1] in "_$" or sql[at - 1] >= "\x80")


def _has_prefix(sql: str, at: int, prefix: str) -> bool:
    begin = at - len(prefix)
    return begin >= 0 and sql[begin:at].upper() == prefix and not _in_word(sql, begin)


_LINE_END = re.compile(r"\n|\Z")
_POSTGRESQL = Lexer(
    re.compile(r"['\"$]|--|/\*"),
    {"'": _SINGLE, '"': _DOUBLE},
    re.compile(r"[\r\n]|\Z"),
    nested_comments=True,
    string_prefixes=True,
)
_MYSQL = Lexer(
    re.compile(r"['\"`#]|--(?=[\x00-\x20]|\Z)|/\*"),
    {"'": _SINGLE, '"': _DOUBLE, "`": _BACKTICKS},
    _LINE_END,
    executed_comments=True,
)
_SQLITE = Lexer(
    re.compile(r"['\"`\[]|--|/\*"),
    {"'": _SINGLE, '"': _DOUBLE, "`": _BACKTICKS, "[": _BRACKETS},
    _LINE_END,
)


def _with_escapes(lexer: Lexer, **quoted: re.Pattern[str]) -> Lexer:
    return lexer._replace(quoted={**lexer.quoted, "'": _SINGLE_ESCAPED, **quoted})


# The first lexer of a vendor is enough for a text without backslashes. Settings of the server
# (standard_conforming_strings, NO_BACKSLASH_ESCAPES, ANSI_QUOTES) decide which of them applies
# otherwise, so the most severe result counts.
LEXERS: Final[dict[str, tuple[Lexer, ...]]] = {
    "postgresql": (_POSTGRESQL, _with_escapes(_POSTGRESQL)),
    "mysql": (_MYSQL, _with_escapes(_MYSQL, **{'"': _DOUBLE_ESCAPED}), _with_escapes(_MYSQL)),
    "sqlite": (_SQLITE,),
}
ALL_LEXERS: Final = tuple(lexer for lexers in LEXERS.values() for lexer in lexers)
