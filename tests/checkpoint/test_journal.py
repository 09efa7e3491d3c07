import pytest

from metadist.checkpoint.journal import Journal, read_journal
from metadist.core.errors import InputError

RECORDS = [{"event": "start", "step": 0}, {"event": "died", "worker": 3}, {"text": "line\r\nbreak \u2028 \u00e9"}]


def write(path, records):
    with Journal(path) as journal:
        for record in records:
            journal.append(record, sync=True)


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    write(path, RECORDS[:2])
    write(path, RECORDS[2:])
    assert read_journal(path) == RECORDS


def test_each_record_is_readable_at_once(tmp_path):
    with Journal(tmp_path / "j") as journal:
        for count, record in enumerate(RECORDS, start=1):
            journal.append(record)
            assert read_journal(tmp_path / "j") == RECORDS[:count]


def test_a_record_torn_at_any_byte_is_left_out_and_cut_off_at_the_next_opening(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, RECORDS)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        assert read_journal(path) == RECORDS[:2]
        write(path, [{"after": size}])
        assert read_journal(path) == [*RECORDS[:2], {"after": size}]


@pytest.mark.parametrize("damage", [b'{"event": "di\n', b"\x00\x00\x00\n", b"[1]\n", b"\n"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a":1}\n' + damage + b'{"b":2}\n')
    with pytest.raises(InputError, match="Line 2 of .*journal.jsonl"):
        read_journal(path)
    with pytest.raises(InputError, match="Line 2"):
        Journal(path)
    assert path.read_bytes().endswith(b'{"b":2}\n')


def test_what_json_cannot_hold_is_refused_and_leaves_the_file_whole(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append({"a": 1})
        with pytest.raises(ValueError):
            journal.append({"a": float("nan")})
        journal.append({"a": 2})
    assert read_journal(tmp_path / "j") == [{"a": 1}, {"a": 2}]
