"""Names in the code of user functions: what they read, set and mention."""

from __future__ import annotations

import dis
import types

_ASSIGNS = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}
_SETTERS = {"setattr", "delattr", "vars", "__dict__", "__setattr__"}
_BY_WORDS = {"STORE_SUBSCR", "DELETE_SUBSCR", "update", "setdefault", "pop", *_SETTERS}


class Names:
    """The names in a function, with functions in it.

    Args:
        codes: of the function; none for no names.
    """

    def __init__(self, *codes: types.CodeType) -> None:
        self.named: set[str] = set()
        """Globals and attributes."""
        self.assigned: set[str] = set()
        """Variables that it sets."""
        self.attributes: set[str] = set()
        """Attributes that it sets."""
        self.words: set[str] = set()
        """Words by which it may set entries."""
        self.mentioned: set[str] = set()
        """All of these, variables of enclosing functions, and constant words."""
        waiting = [*codes]
        for each in waiting:  # grows
            self._read(each)
            waiting += [constant for constant in each.co_consts if isinstance(constant, types.CodeType)]

    def _read(self, code: types.CodeType) -> None:
        operations = {*code.co_names}
        for one in dis.get_instructions(code):
            operations.add(one.opname)
            if one.opname in _ASSIGNS:
                self.assigned.add(str(one.argval))
            elif one.opname in ("STORE_ATTR", "DELETE_ATTR"):
                self.attributes.add(str(one.argval))
        keywords = [one for some in code.co_consts if isinstance(some, tuple) for one in some]
        words = {one for one in (*code.co_consts, *keywords) if isinstance(one, str) and one.isidentifier()}
        self.named |= {*code.co_names}
        self.mentioned |= {*code.co_names, *code.co_freevars, *words}
        self.words |= set() if operations.isdisjoint(_BY_WORDS) else words
        self.attributes |= set() if operations.isdisjoint(_SETTERS) else words
