"""CLINC150 (Larson et al. 2019, github clinc/oos-eval) for few-shot learning of intents of unseen domains.

    python -m tests.examples.clinc150 data_full.json domains.json clinc150.jsonl

makes one JSON line of each query, its own train, validation and test parts together, which `metadist data text`
imports. Of the domains in alphabetical order the first six are for training, the next two for validation, the last two
for the test. Queries out of scope, which have no domain, are left out.
"""

import json
import sys
from pathlib import Path

SPLITS = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2


def records(queries: dict[str, list[tuple[str, str]]], domains: dict[str, list[str]]) -> list[dict[str, str]]:
    """A record of each query with its text, intent, domain and split."""
    split = dict(zip(sorted(domains), SPLITS, strict=True))
    domain = {intent: name for name, intents in domains.items() for intent in intents}
    return [
        {"text": text, "intent": intent, "domain": domain[intent], "split": split[domain[intent]]}
        for part in ("train", "val", "test")
        for text, intent in queries[part]
    ]


if __name__ == "__main__":
    queries, domains, out = map(Path, sys.argv[1:])
    found = records(json.loads(queries.read_text()), json.loads(domains.read_text()))
    out.write_text("".join(json.dumps(record) + "\n" for record in found))
