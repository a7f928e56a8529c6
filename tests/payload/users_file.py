"""A file of the user's that programs import as a module: it is not installed, so what is used of it travels."""

import math

import users_other as below

SCALE = 3
UNSENDABLE = (letter for letter in "abc")
calls = []


def scaled(value):
    return value * SCALE


def unsendable():
    return next(UNSENDABLE)


def through_module(value):
    return below.halved(value) + math.floor(0.5)


def noted(value):
    calls.append(value)
    return len(calls)
