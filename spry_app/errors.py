"""The one error a user is meant to read; raised where a bad value enters, never for our own mistakes."""


class SpryError(Exception):
    """Bad input: says what was got, what is allowed and which key to change."""


class OutOfMemory(SpryError):
    """What was asked takes more memory than there is, or may be taken."""
