"""Every public name says what it is, what it takes and what it returns, and the examples run (as doctests)."""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from enum import Enum
from types import FunctionType, ModuleType

import pytest
from typing_extensions import is_protocol, is_typeddict

import disback_plugin


def _public():
    """Yield every name that users import, and the public methods and properties of the classes among them."""
    for name in disback_plugin.__all__:
        value = getattr(disback_plugin, name)
        if isinstance(value, ModuleType):
            yield from ((f"{name}.{inner}", getattr(value, inner)) for inner in value.__all__)
        else:
            yield name, value


def _methods(value):
    for name, member in vars(value).items():
        function = inspect.unwrap(getattr(member, "__func__", None) or getattr(member, "fget", None) or member)
        if not name.startswith("_") and isinstance(function, FunctionType):
            yield name, function


NAMES = dict(_public())
CALLABLE = {name: value for name, value in NAMES.items() if inspect.isclass(value) or inspect.isfunction(value)}
METHODS = {
    f"{name}.{method}": function
    for name, value in NAMES.items()
    if inspect.isclass(value)
    for method, function in _methods(value)
}
FUNCTIONS = {name: value for name, value in CALLABLE.items() if inspect.isfunction(value)} | METHODS


def test_the_public_names_are_all_found():
    """A count that only grows: were nothing found, everything below would be documented."""
    assert len(NAMES) >= 60
    assert len(METHODS) >= 75


@pytest.mark.parametrize("name", CALLABLE)
def test_every_public_name_has_a_text_and_an_example_that_runs(name):
    text = inspect.getdoc(CALLABLE[name])
    assert text
    assert ">>> " in text, f"{name} has no example"


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_has_a_text(name):
    assert inspect.getdoc(METHODS[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_public_function_is_typed_and_described(name):
    function = inspect.unwrap(FUNCTIONS[name])
    signature = inspect.signature(function)
    text = inspect.getdoc(FUNCTIONS[name])
    assert signature.return_annotation is not signature.empty, f"{name} does not say what it returns"
    for argument in signature.parameters.values():
        if argument.name in ("self", "cls"):
            continue
        assert argument.annotation is not argument.empty, f"{argument.name} of {name} has no type"
        assert re.search(rf"\b{argument.name}\b", text), f"{argument.name} of {name} is not described"


def _is_made_by_a_user(value):
    """Whether a class is called with arguments of its own: no protocol, no error, no member of an enumeration."""
    ours = "__init__" in vars(value) or is_dataclass(value) or issubclass(value, tuple)
    return ours and not (is_protocol(value) or is_typeddict(value) or issubclass(value, (BaseException, Enum)))


CLASSES = [name for name, value in CALLABLE.items() if inspect.isclass(value) and _is_made_by_a_user(value)]


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_of_a_public_class_is_described(name):
    text = inspect.getdoc(CALLABLE[name])
    for argument in inspect.signature(CALLABLE[name]).parameters.values():
        assert re.search(rf"\b{argument.name}\b", text), f"{argument.name} of {name} is not described"
