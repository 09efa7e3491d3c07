import json
from pathlib import Path

from metadist.data import describe

from .example import write_example


def test_a_description_is_complete_and_json(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    told = json.loads(json.dumps(describe(tmp_path / "set")))
    assert told["kind"] == "values" and told["source"] == "made up" and told["licence"] == "none"
    assert told["splits"]["train"] == {"groups": 2, "rows": 5, "rows_per_group": {"min": 2, "max": 3}, "parents": 2}
    assert told["fields"][0] == {
        "name": "image",
        "role": "input",
        "dtype": "uint8",
        "shape": [1, 2, 3],
        "offset": 10.0,
        "scale": 0.5,
        "shared": False,
    }
    assert told["ranges"] == {"image": [0, 59], "price": [0.0, 13.5]}
    assert told["options"] == {"importer": "example"} and len(told["digest"]) == 32
    assert told["size_bytes"] == sum(file.stat().st_size for file in (tmp_path / "set").iterdir())
