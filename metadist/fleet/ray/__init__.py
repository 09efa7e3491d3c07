"""The fleet as Ray actors; the only room beside `run.submission` and `run.doctor` that imports Ray."""
