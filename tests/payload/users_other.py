"""A file that a file of the user's imports."""


def halved(value):
    return value / 2
