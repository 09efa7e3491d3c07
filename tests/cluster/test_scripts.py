"""The shell scripts, with shellcheck."""

import subprocess

import pytest

from tests.cluster.files import CLUSTER
from tests.cluster.test_docker import tool


def shellcheck(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("shellcheck"), "-"], input=text, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_shellcheck_has_nothing_to_say(name):
    done = shellcheck((CLUSTER / name).read_text())
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_a_name_that_is_not_quoted():
    broken = (CLUSTER / "local.sh").read_text().replace('rm -f "$LOCAL_CLUSTER/$name.pid"', "rm -f $LOCAL_CLUSTER/$1/*")
    assert "SC2086" in shellcheck(broken).stdout


def test_nothing_ends_what_others_have_started():
    """`ray stop`, `ray symmetric-run` (which ends with it) and pkill end processes of others."""
    for name in ("local.sh", "slurm.sbatch"):
        commands = [line for line in (CLUSTER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not any(word in line for line in commands for word in ("ray stop", "symmetric-run", "pkill", "killall"))
