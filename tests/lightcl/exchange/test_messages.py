"""Messages: to flat records and back, and what is refused on the way in."""

from dataclasses import fields

import pytest

from lightcl.exchange import messages as protocol
from lightcl.exchange.messages import Greeting, Instruction, ProtocolError, Refusal, Trained

MESSAGES = [Instruction, Greeting, Trained, protocol.Tested, Refusal]
EXAMPLES = {"bool": True, "str": "text", "int": 3, "float": 0.5, "list[float]": [0.5, 1.0], "list[int]": [1, 2]}
WRONG = {"bool": 1, "str": 3, "int": "3", "float": "0.5", "list[float]": 0.5, "list[int]": "12"}


def example(message):
    return message(**{field.name: EXAMPLES[str(field.type)] for field in fields(message)})


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_survive_the_way_through_a_record(message):
    record = example(message).to_record()
    assert message.from_record(record) == example(message)
    held = {bool, str, int, float, list}  # flat: what a ConfigRecord holds
    assert {type(value) for value in record.values()} <= held


@pytest.mark.parametrize(
    ("message", "field"),
    [
        pytest.param(message, field, id=f"{message.__name__}.{field.name}")
        for message in MESSAGES
        for field in fields(message)
    ],
)
def test_missing_and_mistyped_fields_are_named(message, field):
    record = example(message).to_record()
    for wrong in ({field.name: WRONG[str(field.type)]}, {field.name: None}):
        with pytest.raises(ProtocolError, match=rf"{message.__name__}\.{field.name} is .*, expected "):
            message.from_record(record | wrong)
    del record[field.name]
    with pytest.raises(ProtocolError, match=rf"{message.__name__}\.{field.name} is None"):
        message.from_record(record)


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_message_without_its_record_is_refused(nothing):
    with pytest.raises(ProtocolError, match=r"Instruction\.\w+ is None"):
        Instruction.from_record(nothing)


def test_unknown_fields_are_ignored():
    record = example(Refusal).to_record() | {"newer": 1}
    assert Refusal.from_record(record) == example(Refusal)
