"""One object gets other methods; its class, and other objects of it, stay as they are."""

from __future__ import annotations

import copy
import pickle

from scaled_rope.patching.class_exchange import exchange_class


class Plain:
    def __init__(self) -> None:
        self.value = 1

    def say(self) -> str:
        return "plain"


class Louder:
    def say(self) -> str:
        return super().say().upper()  # type: ignore[misc]


def test_one_object_and_its_copies() -> None:
    changed, other = Plain(), Plain()
    exchange_class(changed, Louder)
    exchange_class(changed, Louder)  # a second time changes nothing
    assert (changed.say(), other.say(), Plain().say()) == ("PLAIN", "plain", "plain")
    assert isinstance(changed, Plain) and type(changed).__name__ == "Plain"
    changed.value = 2
    for again in (copy.copy(changed), copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert (again.say(), again.value) == ("PLAIN", 2) and isinstance(again, Plain)
