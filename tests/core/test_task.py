import numpy as np
import pytest
import torch

from metadist.core.task import Examples, Task, TaskId, Tasks, stack


@pytest.mark.parametrize("task_id", [TaskId("train", 120, 7), TaskId("validation", 0, 0), TaskId("test", 0, 599)])
def test_parse_is_the_inverse_of_str(task_id):
    assert TaskId.parse(str(task_id)) == task_id


def test_a_task_id_reads_as_split_step_index():
    assert str(TaskId("train", 120, 7)) == "train:120:7"


@pytest.mark.parametrize("text", ["training:0:0", "train:0", "train:0:0:0", "train:x:0", ""])
def test_text_that_names_no_task_is_refused(text):
    with pytest.raises(ValueError):
        TaskId.parse(text)


def test_map_applies_to_every_array():
    task = Task(Examples((1, 2), (3,)), Examples((4, 5), (6,))).map(lambda x: 10 * x)
    assert task == Task(Examples((10, 20), (30,)), Examples((40, 50), (60,)))


def test_stack_gives_every_array_a_leading_task_axis():
    tasks = [
        Task(
            Examples((torch.full((4, 2), t), torch.full((4,), t)), (torch.full((4,), -t),)),
            Examples((torch.full((3, 2), t), torch.full((3,), t)), (torch.full((3,), -t),)),
        )
        for t in range(5)
    ]
    stacked = stack(tasks, torch.stack)
    assert stacked.support.inputs[0].shape == (5, 4, 2) and stacked.query.inputs[0].shape == (5, 3, 2)
    assert stacked.support.inputs[1].shape == (5, 4) and stacked.query.targets[0].shape == (5, 3)
    for t, task in enumerate(tasks):
        assert torch.equal(stacked.query.inputs[0][t], task.query.inputs[0])
        assert torch.equal(stacked.support.targets[0][t], task.support.targets[0])


def test_tasks_with_different_fields_do_not_stack():
    one = Task.of(np.zeros((2, 1)), np.zeros(2), np.zeros((2, 1)), np.zeros(2))
    two = Task(Examples((np.zeros(2), np.zeros(2)), (np.zeros(2),)), Examples((np.zeros(2), np.zeros(2)), ()))
    with pytest.raises(ValueError):
        stack([one, two], np.stack)


def test_tasks_are_a_sequence_of_views():
    inputs, labels = np.arange(24.0).reshape(4, 3, 2), np.arange(12).reshape(4, 3)
    tasks = Tasks(Task.of(inputs[:, :2], labels[:, :2], inputs[:, 2:], labels[:, 2:]))
    assert len(tasks) == len(list(tasks)) == 4
    assert np.array_equal(tasks[1].support.inputs[0], inputs[1, :2])
    assert np.array_equal(tasks[-1].query.targets[0], labels[3, 2:])
    assert np.shares_memory(tasks[2].support.inputs[0], inputs)
    some = tasks[1:3]
    assert isinstance(some, Tasks) and len(some) == 2
    assert np.array_equal(some[1].query.inputs[0], inputs[2, 2:])
    with pytest.raises(IndexError):
        tasks[4]
    again = stack(list(tasks), np.stack)
    assert all(np.array_equal(a, b) for a, b in zip(again.support.inputs, tasks.stacked.support.inputs, strict=True))
