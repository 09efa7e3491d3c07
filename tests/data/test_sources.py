import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch

from metadist.core.errors import InputError
from metadist.core.task import Task, TaskId, Tasks
from metadist.data import Dataset, importers, open_dataset
from metadist.data.sources import ClassSource, LabelledSource, Source, ValueSource, sample
from metadist.engine import Engine
from metadist.learners import MAML
from metadist.models import MLP, Model
from metadist.models.losses import accuracy, cross_entropy

from .example import digest

TASKS = [TaskId("train", step, index) for step in range(20) for index in range(10)]


def write(folder: Path, name: str, rows: list[tuple], columns: list[str], **how) -> Dataset:
    """The rows, shuffled, as an imported table; `id` is its only input, so that a row can be told from any other."""
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    source = folder / f"{name}.csv"
    pyarrow.csv.write_csv(pa.table({c: list(v) for c, v in zip(columns, zip(*rows, strict=True), strict=True)}), source)
    how = {"group": "group", "inputs": ["id"], "split_column": "split"} | how
    return open_dataset(importers.table(source, folder / name, **how))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def classes(folder) -> Dataset:
    """Class g has the ids 100 g, 100 g + 1, ...; six classes of 12 in parent A, four in B, and one of 3 in A."""
    sizes = dict.fromkeys(range(18), 12) | {10: 3}
    rows = [
        (100 * g + i, f"class {g:02}", "B" if 6 <= g < 10 else "A", split)
        for g, size in sizes.items()
        for split in ["train" if g <= 10 else "validation" if g <= 13 else "test"]
        for i in range(size)
    ]
    return write(folder, "classes", rows, ["id", "group", "parent", "split"], parent="parent")


def user_rows(labels: list[int]) -> list[tuple]:
    """User u has 6 rows of each label, but user 3 lacks the first, and user 4 has 2 rows of the second."""
    return [
        (10000 * u + 100 * place + i, f"user {u}", label, "train")
        for u in range(6)
        for place, label in enumerate(labels)
        for i in range(2 if (u, place) == (4, 1) else 6)
        if (u, place) != (3, 0)
    ]


@pytest.fixture(scope="module")
def users(folder) -> Dataset:
    columns = ["id", "group", "label", "split"]
    return write(folder, "users", user_rows([-1, 1, 10**12]), columns, targets=["label"], kind="labelled")


@pytest.fixture(scope="module")
def curves(folder) -> Dataset:
    """Group g has 8 points, with two targets."""
    rows = [(100 * g + i, f"curve {g}", g + i / 8, -g, i / 2, "train") for g in range(5) for i in range(8)]
    columns = ["id", "group", "y", "z0", "z1", "split"]
    return write(folder, "curves", rows, columns, targets=["y", "z=z0,z1"], kind="values")


@pytest.fixture(scope="module")
def sources(classes, users, curves) -> dict[str, Source]:
    return {
        "classes": ClassSource(classes.splits, 2, 3, 0, ways=3),
        "labelled": LabelledSource(users.splits, 1, 3, 0, ways=2),
        "values": ValueSource(curves.splits, 2, 3, 0),
    }


SCHEMES = ["classes", "labelled", "values"]
GOLDEN = {"classes": "132bd5f820bb6142", "labelled": "63de0ecb8ff4189b", "values": "7398e391eb55927d"}


def ids(task: Task) -> tuple[list[int], list[int]]:
    return task.support.inputs[0].tolist(), task.query.inputs[0].tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_task_stays_what_it_was(sources, scheme):
    assert digest(sources[scheme](TaskId("train", 7, 3))) == GOLDEN[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_task_is_a_function_of_its_name(sources, classes, users, curves, scheme):
    others = {
        "classes": lambda: ClassSource(open_dataset(classes.path).splits, 2, 3, 0, ways=3),
        "labelled": lambda: LabelledSource(open_dataset(users.path).splits, 1, 3, 0, ways=2),
        "values": lambda: ValueSource(open_dataset(curves.path).splits, 2, 3, 0),
    }
    source, other = sources[scheme], others[scheme]()
    first = [digest(source(task_id)) for task_id in TASKS]
    assert [digest(other(task_id)) for task_id in reversed(TASKS)][::-1] == first
    assert [digest(source(task_id)) for task_id in TASKS] == first
    assert len(set(first)) > len(TASKS) * 0.9


@pytest.mark.parametrize("names", [TASKS[:1], TASKS[:32], TASKS[40:30:-3], [TASKS[5], TASKS[5]]], ids=len)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tasks_sampled_together_are_those_sampled_alone(sources, scheme, names):
    source = sources[scheme]
    together = sample(source, names)
    assert isinstance(together, Tasks) and len(together) == len(names)
    for task, name in zip(together, names, strict=True):
        assert digest(task) == digest(source(name))
    assert [part.inputs[0].shape[0] for part in together.stacked] == [len(names)] * 2


def test_tasks_of_every_scheme_may_be_of_any_split(classes):
    source = ClassSource(classes.splits, 2, 3, 0, ways=3, within_parent=False)
    for split in ("validation", "test"):
        names = [TaskId(split, 0, index) for index in range(9)]
        assert [digest(task) for task in source.sample(names)] == [digest(source(name)) for name in names]


def test_pools_of_several_parents_are_drawn_for_each_task_of_a_sample(classes):
    source = ClassSource(classes.splits, 2, 3, 0, ways=3, within_parent=True)
    assert [digest(task) for task in source.sample(TASKS[:40])] == [digest(source(name)) for name in TASKS[:40]]


def test_a_source_of_ones_own_need_not_know_how_to_sample(sources):
    tasks = sample(lambda task_id: sources["values"](task_id), TASKS[:3])
    assert [digest(task) for task in tasks] == [digest(sources["values"](name)) for name in TASKS[:3]]


def test_another_process_draws_the_same_tasks(sources, classes):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from metadist.core.task import TaskId
from metadist.data import open_dataset
from metadist.data.sources import ClassSource
from tests.data.example import digest
source = ClassSource(open_dataset({str(classes.path)!r}).splits, 2, 3, 0, ways=3)
print([digest(source(TaskId("train", step, index))) for step in range(2) for index in range(10)])
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([digest(sources["classes"](task_id)) for task_id in TASKS[:20]])


def test_the_seed_the_split_the_step_and_the_index_change_the_task(classes):
    source, other = (ClassSource(classes.splits, 2, 3, seed, ways=3) for seed in (0, 1))
    told = {digest(source(TaskId(s, t, i))) for s in ("train", "test") for t in range(3) for i in range(3)}
    assert len(told) == 18
    assert digest(other(TaskId("train", 0, 0))) not in told


@pytest.mark.parametrize("scheme", SCHEMES)
def test_support_and_query_share_no_row(sources, scheme):
    for task_id in TASKS:
        support, query = ids(sources[scheme](task_id))
        assert len({*support, *query}) == len(support) + len(query)


def test_a_class_task_has_its_ways_ordered_by_label(sources):
    assert sources["classes"].outputs == 3
    for task_id in TASKS[:50]:
        task = sources["classes"](task_id)
        support, query = ids(task)
        assert task.support.targets[0].tolist() == [0, 0, 1, 1, 2, 2]
        assert task.query.targets[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        groups = [i // 100 for i in support[::2]]
        assert len(set(groups)) == 3
        assert [i // 100 for i in support] == [g for g in groups for _ in range(2)]
        assert [i // 100 for i in query] == [g for g in groups for _ in range(3)]


def test_splits_have_disjoint_classes(sources):
    seen = {
        split: {i // 100 for index in range(50) for i in ids(sources["classes"](TaskId(split, 0, index)))[0]}
        for split in ("train", "validation", "test")
    }
    assert seen == {"train": set(range(10)), "validation": {11, 12, 13}, "test": {14, 15, 16, 17}}


def test_label_order_is_uniform_over_permutations(sources):
    trials = 3000
    orders = Counter(
        tuple(i // 100 for i in ids(sources["classes"](TaskId("validation", 0, index)))[0][::2])
        for index in range(trials)
    )
    assert len(orders) == 6
    assert sum((count - trials / 6) ** 2 / (trials / 6) for count in orders.values()) < 5 + 5 * math.sqrt(10)


def test_every_row_of_a_class_is_drawn_equally_often(sources):
    drawn = Counter(i for index in range(1200) for i in ids(sources["classes"](TaskId("validation", 0, index)))[0])
    expected = 1200 * 6 / 36
    assert len(drawn) == 36
    assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 35 + 5 * math.sqrt(70)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_queries_leave_the_support_set_as_it_is(classes, users, curves, scheme):
    make = {
        "classes": lambda q: ClassSource(classes.splits, 2, q, 0, ways=3),
        "labelled": lambda q: LabelledSource(users.splits, 1, q, 0, ways=2),
        "values": lambda q: ValueSource(curves.splits, 2, q, 0),
    }[scheme]
    few, many = make(3), make(5)
    for task_id in TASKS[:50]:
        assert ids(few(task_id))[0] == ids(many(task_id))[0]


def test_an_untrained_model_is_right_by_chance(classes):
    """The inputs tell the class, so labels that carried its identity would show."""
    source = ClassSource(classes.splits, 1, 5, 0, ways=4)
    torch.manual_seed(0)
    model = Model(MLP([[18]], 4, hidden=(32,)))
    engine = Engine(MAML(model=model, loss=cross_entropy), "vmap")
    eye = np.eye(18, dtype=np.float32) * 5
    tasks = [source(TaskId("train", 0, index)) for index in range(1000)]
    tasks = [task.map(lambda x: x if x.max() < 4 else eye[x // 100]) for task in tasks]
    measured = engine.evaluate(engine.initial_theta(), tasks, {"accuracy": accuracy})["accuracy"][:, 0]
    assert len(set(measured.tolist())) > 2
    assert abs(float(measured.mean()) - 1 / 4) < 4 * float(measured.std()) / math.sqrt(1000)


def test_within_parent_draws_all_ways_from_one_parent(classes):
    source = ClassSource(classes.splits, 2, 3, 0, ways=3, within_parent=True)
    parents = [{6 <= i // 100 < 10 for i in ids(source(task_id))[0]} for task_id in TASKS]
    assert all(len(seen) == 1 for seen in parents)
    assert {True} in parents and {False} in parents


def test_classes_with_too_few_examples_are_left_out(classes):
    drawn = {
        i // 100
        for task_id in TASKS
        for i in ids(ClassSource(classes.splits, 1, 2, 0, ways=5)(task_id))[0]
    }  # fmt: skip
    assert drawn == set(range(11))
    assert 10 not in {i // 100 for t in TASKS for i in ids(ClassSource(classes.splits, 1, 3, 0, ways=5)(t))[0]}


def test_a_labelled_task_is_of_one_user_and_its_ways_are_labels(sources):
    assert sources["labelled"].outputs == 2
    for task_id in TASKS:
        task = sources["labelled"](task_id)
        support, query = ids(task)
        assert len({i // 10000 for i in support + query}) == 1
        assert task.support.targets[0].tolist() == [0, 1]
        assert task.query.targets[0].tolist() == [0, 0, 0, 1, 1, 1]
        labels = [i // 100 for i in support]
        assert len(set(labels)) == 2 and [i // 100 for i in query] == [label for label in labels for _ in range(3)]


def test_labelled_users_need_enough_rows_of_enough_labels(users):
    def seen(ways: int) -> set[tuple[int, int]]:
        source = LabelledSource(users.splits, 1, 3, 0, ways=ways)
        return {(i // 10000, i // 100 % 100) for t in TASKS for i in ids(source(t))[0]}

    assert seen(3) == {(u, place) for u in (0, 1, 2, 5) for place in range(3)}
    assert {place for user, place in seen(2) if user == 3} == {1, 2}
    assert {place for user, place in seen(2) if user == 4} == {0, 2}


@pytest.mark.parametrize("permute", [True, False])
def test_permute_labels_decides_whether_labels_keep_the_tables_order(users, permute):
    source = LabelledSource(users.splits, 1, 2, 0, ways=2, permute_labels=permute)
    orders = [[i // 100 % 100 for i in ids(source(task_id))[0]] for task_id in TASKS]
    assert all(order == sorted(order) for order in orders) is not permute
    assert len({tuple(order) for order in orders}) == (6 if permute else 3)


@pytest.mark.parametrize(("ways", "permute", "shared"), [(3, False, True), (3, True, False), (2, False, False)])
def test_labels_are_shared_where_every_task_has_all_of_them_in_one_order(users, ways, permute, shared):
    assert bool(LabelledSource(users.splits, 1, 2, 0, ways=ways, permute_labels=permute).labels) is shared


def test_a_value_task_has_the_points_of_one_curve_with_their_targets(sources):
    assert sources["values"].outputs == 3
    for task_id in TASKS:
        task = sources["values"](task_id)
        assert [array.shape for array in task.support.inputs + task.support.targets] == [(2,), (2,), (2, 2)]
        assert [array.shape for array in task.query.inputs + task.query.targets] == [(3,), (3,), (3, 2)]
        assert len({i // 100 for part in ids(task) for i in part}) == 1
        for part in task:
            group, place = part.inputs[0] // 100, part.inputs[0] % 100
            assert np.array_equal(part.targets[0], (group + place / 8).astype(np.float32))
            assert np.array_equal(part.targets[1], np.stack([-group, place / 2], axis=1).astype(np.float32))


def test_sources_travel_to_another_process_without_their_data(sources):
    import pickle

    for source in sources.values():
        copy = pickle.loads(pickle.dumps(source))
        assert digest(copy(TASKS[0])) == digest(source(TASKS[0]))
    assert len(pickle.dumps(ClassSource(sources["classes"].tables, 2, 3, 0, ways=3))) < 2000


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda t: ClassSource(t["classes"], 1, 3, 0, ways=11),
     r"split 'train' has 10 classes \(of 11\) with the 4 examples that 1 shots and 3 queries take, and 11 ways"),
    (lambda t: ClassSource(t["classes"], 1, 12, 0, ways=2), r"has 0 classes \(of 11\) .* lower ways, shots or queries"),
    (lambda t: ClassSource(t["classes"], 1, 3, 0, ways=7, within_parent=True), r"7 ways need 7 of one parent: lower"),
    (lambda t: ClassSource(t["users"], 1, 3, 0, ways=2, within_parent=True), "within_parent needs data with parents"),
    (lambda t: LabelledSource(t["users"], 1, 3, 0, ways=4), r"no group of split 'train' has 4 labels with the 4 rows"),
    (lambda t: LabelledSource(t["users"], 1, 6, 0, ways=2), r"no group .* with the 7 rows that 1 shots and 6 queries"),
    (lambda t: LabelledSource(t["classes"], 1, 3, 0, ways=2), r"needs a table with one target field.*this one has no"),
    (lambda t: LabelledSource(t["curves"], 1, 3, 0, ways=2), r"this one has y \(float64\), z \(float64\)"),
    (lambda t: ValueSource(t["curves"], 4, 5, 0), r"no group .* has the 9 rows .* \(its largest has 8\): lower shots"),
    (lambda t: ValueSource(t["classes"], 1, 3, 0), r"scheme=values needs a table with a target field"),
])  # fmt: skip
def test_what_the_data_cannot_give_is_said_in_a_sentence(classes, users, curves, make, sentence):
    tables = {"classes": classes.splits, "users": users.splits, "curves": curves.splits}
    with pytest.raises(InputError, match=sentence):
        make(tables)(TaskId("train", 0, 0))


def test_an_absent_split_is_named(users):
    with pytest.raises(InputError, match="the data has no split 'test', only train"):
        LabelledSource(users.splits, 1, 3, 0, ways=2)(TaskId("test", 0, 0))


def test_in_order_of_time_support_comes_before_query(tmp_path: Path) -> None:
    rows = [(100 * u + i, f"user {u}", i % 2, i / 2, (50 - i) * 60, "train") for u in range(5) for i in range(20)]
    columns = ["id", "group", "label", "value", "when", "split"]
    for target, source in (
        ("label", lambda splits, **how: LabelledSource(splits, **how, ways=2)),
        ("value", ValueSource),
        (None, lambda splits, **how: ClassSource(splits, **how, ways=3)),
    ):
        targets = [target] if target else []
        splits = write(tmp_path, f"by {target}", rows, columns, targets=targets, time="when").splits
        drawn, plain = (source(splits, shots=2, queries=3, seed=0, in_order=in_order) for in_order in (True, False))
        mixed = 0
        for task_id in TASKS:
            for task, kept in ((drawn(task_id), True), (plain(task_id), False)):
                support, query = (part.inputs[0].reshape(-1) for part in task)
                ways = len(support) // 2
                # ids count against time: the earliest row of a user has the largest id
                earlier = [
                    support[2 * way : 2 * way + 2].min() > query[3 * way : 3 * way + 3].max() for way in range(ways)
                ]
                if kept:
                    assert all(earlier) and (np.diff(support.reshape(ways, 2)) < 0).all()
                mixed += not all(earlier)
        assert mixed > len(TASKS) // 2  # without it, they come as they are drawn


def test_a_window_is_consecutive_rows_in_the_order_of_time_from_anywhere(tmp_path: Path) -> None:
    rows = [(100 * u + i, f"user {u}", i / 2, i, "train") for u in range(4) for i in range(5 + 5 * u)]
    columns = ["id", "group", "value", "when", "split"]
    splits = write(tmp_path, "windows", rows[::-1], columns, targets=["value"], time="when").splits
    source = ValueSource(splits, shots=2, queries=3, seed=0, in_order=True, window=True)
    begun = []
    for number in range(2000):
        support, query = (part.inputs[0].reshape(-1) for part in source(TaskId("train", 0, number)))
        ids = np.concatenate([support, query])
        np.testing.assert_array_equal(np.diff(ids), 1)
        begun.append(int(ids[0]))
    # each user equally often, and each of the places at which five rows in a row begin
    assert sorted(set(begun)) == [100 * u + i for u in range(4) for i in range(1 + 5 * u)]
    counts = Counter(begun)
    assert abs(counts[0] - 500) < 100 and all(abs(counts[100 + i] - 500 / 6) < 40 for i in range(6))


def test_combinations_are_counted_by_what_tasks_can_be_made_of(classes, users):
    """Eleven classes of which one has too few rows: C(10, 3) sets of three, within a parent C(6, 3) + C(4, 3)."""
    options = {"shots": 4, "queries": 4, "seed": 0, "ways": 3}
    assert ClassSource(classes.splits, **options).combinations("train") == 120
    assert ClassSource(classes.splits, **options, within_parent=True).combinations("train") == 24
    assert ClassSource(classes.splits, **options).combinations("validation") == 1
    with pytest.raises(InputError):
        ClassSource(classes.splits, **options | {"ways": 12}).combinations("train")
    # six users with every pair of three labels, but two of them lack one label (3 for each of 4, 1 for each of 2)
    assert LabelledSource(users.splits, shots=2, queries=2, seed=0, ways=2).combinations("train") == 14
