"""Mistakes that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line: what is wrong, the value, what to do.

    The root scripts print the message without a traceback and exit with code 2.
    """
