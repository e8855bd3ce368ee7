"""English for captions: number words, articles and plurals of drawing names."""

from __future__ import annotations

NUMBERS = ("no", "one", "two", "three", "four")

_IRREGULAR = {"leaf": "leaves", "loaf": "loaves", "wolf": "wolves", "fish": "fish", "blowfish": "blowfish"}


def count_word(count: int) -> str:
    """Return the number word of a count; "many" above four, where nobody counts at a glance."""
    return NUMBERS[count] if count < len(NUMBERS) else "many"


def pluralize(name: str) -> str:
    """Return the plural of a drawing's name; its last word carries it ("red apple" becomes "red apples")."""
    head, _, last = name.rpartition(" ")
    if last in _IRREGULAR:
        plural = _IRREGULAR[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        plural = last[:-1] + "ies"
    elif last.endswith(("s", "x", "ch", "sh")) or last in ("tomato", "volcano", "tornado"):
        plural = last + "es"
    else:
        plural = last + "s"
    return f"{head} {plural}".strip()


def count_phrase(count: int, name: str) -> str:
    """Return "a red apple", "two red apples" or "many red apples"."""
    if count == 1:
        return f"{article(name)} {name}"
    return f"{count_word(count)} {pluralize(name)}"


def article(name: str) -> str:
    """Return the indefinite article of a name."""
    return "an" if name[0] in "aeiou" and not name.startswith("uni") else "a"
