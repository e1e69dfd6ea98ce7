"""Parts of a run from settings."""

import pytest

from kshot.building import instantiated
from kshot.errors import UserError, user_error_behind


class Parser:
    def __init__(self, error):
        self.error = error

    def parse_object(self, settings):
        raise self.error

    def instantiate(self, config):
        raise AssertionError("nothing was parsed")


def test_a_mistake_behind_a_librarys_exception_is_raised():
    wrapped = ValueError("union")
    wrapped.__cause__ = UserError("rank is -1")
    with pytest.raises(UserError, match="rank is -1"):
        instantiated(Parser(wrapped), {})


def test_a_fault_stays_what_it_is():
    fault = ValueError("a fault")
    with pytest.raises(ValueError, match="a fault") as found:
        instantiated(Parser(fault), {})
    assert found.value.__cause__ is None, "a chain without an end"
    assert user_error_behind(found.value) is None
