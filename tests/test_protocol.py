"""What travels arrives as it was sent, through Flower's protobuf; what cannot be read is refused in words."""

import math

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from hypothesis import given
from hypothesis import strategies as st

from spry_app.errors import SpryError
from spry_app.protocol import (
    Introduction,
    MalformedReply,
    Score,
    Task,
    TrainReply,
    introduction_request,
    refusal,
    refusal_reason,
    size_bytes,
)

TENSORS = {"a.weight": torch.tensor([[1.5, -2.0]]), "b": torch.tensor(math.pi), "empty": torch.zeros(0, 3)}
CORRECT = {"correct": (0, 1)}
TASK = Task(3, 1, TENSORS, ("u", "head"), "f" * 64, evaluate=True, measure=False, update={"b": torch.ones(2)})


def wire(message: Message) -> Message:
    return message_from_proto(message_to_proto(message))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_a_task_arrives_as_it_was_sent() -> None:
    arrived = Task.from_message(wire(TASK.to_message(5)))
    assert same(arrived.tensors, TENSORS)
    assert same(arrived.update, TASK.update)
    assert (arrived.round, arrived.client, arrived.units, arrived.fingerprint, arrived.evaluate, arrived.measure) == (
        (3, 1, ("u", "head"), "f" * 64, True, False)
    )


@pytest.mark.parametrize("personal", [None, Score(1.5, {"correct": 3}, 4)])
@pytest.mark.parametrize("slopes", [(), ((0.1, -1e-30), (1e30, 2.0))])
def test_a_reply_arrives_as_it_was_sent(personal: Score | None, slopes: tuple) -> None:
    reply = TrainReply(TENSORS, slopes, 0.25, 16, 1.0, 37.5, 12.5, personal, steps=2, steps_asked=5)
    arrived = TrainReply.from_message(wire(reply.to_message(TASK.to_message(5))), CORRECT)
    assert same(arrived.tensors, TENSORS)
    assert arrived.slopes == slopes
    assert (arrived.loss, arrived.examples, arrived.peak_mib, arrived.personal) == (0.25, 16, 12.5, personal)
    assert (arrived.seconds, arrived.forwards) == (1.0, 37.5)
    assert (arrived.steps, arrived.steps_asked) == (2, 5)


def test_the_largest_seed_and_partition_survive() -> None:
    introduction = Introduction(2**31, "x", 1, 0, "d", memory_mib=1e9)
    assert Introduction.from_message(wire(introduction.to_message(introduction_request(1, "x")))) == introduction


@pytest.mark.parametrize("memory", [math.nan, math.inf, -1.0])
def test_an_impossible_memory_is_refused(memory: float) -> None:
    message = Introduction(0, "x", 1, 0, "d", memory_mib=memory).to_message(introduction_request(1, "x"))
    with pytest.raises(MalformedReply, match="an impossible memory"):
        Introduction.from_message(wire(message))


def test_a_refusal_carries_its_sentence() -> None:
    assert refusal_reason(wire(refusal(TASK.to_message(5), SpryError("set data.source")))) == "set data.source"
    assert refusal_reason(wire(Score(1.0, {"correct": 1}, 2).to_message(TASK.to_message(5)))) == ""


def test_size_is_that_of_the_serialised_content() -> None:
    message = TASK.to_message(5)
    assert size_bytes(message) == size_bytes(wire(message))
    assert 0 < size_bytes(message) <= len(message_to_proto(message).SerializeToString())


records = st.one_of(
    st.just(ConfigRecord({"x": "y"})),
    st.just(MetricRecord({})),
    st.just(ArrayRecord({})),
    st.dictionaries(
        st.sampled_from(
            ["train-loss", "num-examples", "seconds", "forwards", "peak-mib", "steps", "slopes", "correct", "heldout"]
        ),
        st.one_of(st.integers(-(2**40), 2**40), st.floats(), st.lists(st.floats(), max_size=5)),
    ).map(MetricRecord),
)


@given(content=st.dictionaries(st.sampled_from(["arrays", "metrics", "introduction", "refusal"]), records))
def test_any_reply_is_read_or_refused_but_never_crashes(content: dict) -> None:
    message = Message(content=RecordDict(content), reply_to=TASK.to_message(5))
    readers = [lambda m: TrainReply.from_message(m, CORRECT), lambda m: Score.from_message(m, CORRECT)]
    for read in (*readers, Introduction.from_message):
        try:
            read(message)
        except MalformedReply as error:
            assert str(error)
