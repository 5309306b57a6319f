from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cl_dist.errors import BadInput
from cl_dist.launch.slurm import SlurmJob, captured_environment, default_warning, job_name, quote, seconds

BODY = "# From here on, the script is the same for every job."
NASTY = ["$(touch broken)", "`touch broken`", "a'b", 'a"b', "\\", "a\nb", "\n#SBATCH --nodes=9\n", "!!", "*", "~", "",
         " ", "a\r\nb", "\t", "ü", "\u2028", "\udcff", "-n", "${PATH}", "; exit 7 #", "')"]  # fmt: skip

# Everything that an argument can hold: any text without NUL, and bytes that are no UTF-8 as Python has them.
words = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.binary().map(lambda value: os.fsdecode(value.replace(b"\0", b"."))),
)


def job(**changes: Any) -> SlurmJob:
    values = {"name": "run", "run_folder": "/r", "working_folder": "/w", "python": "/bin/python", "arguments": ["run"]}
    return SlurmJob(**{**values, **changes})


def in_bash(text: str, *arguments: str) -> list[str]:
    """The words that bash expands `arguments` to after running `text`, in a folder where no file can be created."""
    printing = f"{text}\nprintf '%s\\0' {' '.join(arguments)}"
    done = subprocess.run(["bash", "-c", printing], capture_output=True, check=True, env={}, cwd="/proc/self")
    assert done.stderr == b""
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@settings(max_examples=60)
@given(arguments=st.lists(words, max_size=4), folder=words, value=words)
@example(arguments=NASTY, folder=NASTY[0], value=NASTY[5])
def test_no_value_breaks_out_of_the_script(arguments: list[str], folder: str, value: str) -> None:
    made = job(arguments=arguments, run_folder=folder, working_folder=folder, python=folder, environment={"X": value})
    head, _, _ = made.script().partition(BODY)
    assert all(line.isprintable() for line in head.splitlines())
    read = in_bash(head, '"$python"', '"$run_folder"', '"$working_folder"', '"$X"', '"${arguments[@]}"')
    assert read == [folder, folder, folder, value, *arguments]
    # What Slurm reads ends before the first of these values.
    assert directives(made) == directives(job())


def directives(made: SlurmJob) -> list[str]:
    before, _, after = made.script().partition("\nset -u\n")
    assert "#SBATCH" not in "\n".join(line[:7] for line in after.splitlines())
    return before.splitlines()[1:]


@given(words)
@example("\0")
def test_one_word_on_one_line(value: str) -> None:
    if "\0" in value:
        with pytest.raises(BadInput, match="NUL"):
            quote(value)
        return
    assert quote(value).isprintable()


@given(st.text())
def test_any_text_becomes_a_valid_job_name(text: str) -> None:
    assert f"#SBATCH --job-name={job_name(text)}" in directives(job(name=job_name(text)))


def test_the_requests_to_slurm() -> None:
    made = job(
        name="mine", nodes=2, gpus_per_node=4, cpus_per_rank=8, time="1-12:00:00", partition="a100,h100",
        options=["account=physics", "exclusive", "constraint=[a|b]"],
    )  # fmt: skip
    assert directives(made) == [
        "#SBATCH --job-name=mine",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --partition=a100,h100",
        "#SBATCH --output=slurm-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --account=physics",
        "#SBATCH --exclusive",
        "#SBATCH --constraint=[a|b]",
    ]
    assert made.ranks == 8
    assert "CUDA_VISIBLE_DEVICES" not in made.script()


def test_without_gpus_ranks_run_on_cpus() -> None:
    made = job(nodes=2, ranks_per_node=3)
    assert made.ranks == 6
    assert "export CUDA_VISIBLE_DEVICES=''\nexport DS_ACCELERATOR=cpu\n" in made.script()
    assert not any("gpu" in line for line in directives(made))


def test_gpus_may_have_a_type() -> None:
    made = job(nodes=2, gpus_per_node="a100:4")
    assert made.ranks == 8
    assert "#SBATCH --ntasks-per-node=4" in directives(made)
    assert "#SBATCH --gpus-per-node=a100:4" in directives(made)
    assert "CUDA_VISIBLE_DEVICES" not in made.script()
    assert "DS_ACCELERATOR=cpu" in job(gpus_per_node="0").script()


def test_the_interface_applies_to_both_libraries() -> None:
    assert "export GLOO_SOCKET_IFNAME=ib0,eth1\n" in job(interface="ib0,eth1").script()
    script = job(interface="ib0", environment={"NCCL_SOCKET_IFNAME": "eth0"}).script()
    assert "export NCCL_SOCKET_IFNAME=ib0\nexport" in script
    assert "export GLOO_SOCKET_IFNAME=ib0\n" in script


def test_the_environment_is_kept_without_secrets() -> None:
    shell = {"PATH": "/bin", "HF_HOME": "/hf", "HF_TOKEN": "hf_x", "NCCL_IB_HCA": "mlx5", "NCCL_A B": "x", "RANK": "1"}
    assert captured_environment(shell, "/venv/bin/python") == {
        "PATH": "/venv/bin:/bin",
        "HF_HOME": "/hf",
        "NCCL_IB_HCA": "mlx5",
    }


def test_compilers_fabrics_and_proxies_are_kept_without_passwords() -> None:
    kept = {
        "CC": "gcc-12", "CXX": "g++-12", "CUDA_PATH": "/cuda", "CPATH": "/i@1", "LIBRARY_PATH": "/l",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "UCX_TLS": "rc", "FI_PROVIDER": "efa",
        "SSL_CERT_FILE": "/ca", "NO_PROXY": ".site",
        "REQUESTS_CA_BUNDLE": "/ca", "http_proxy": "http://proxy:3128", "HTTPS_PROXY": "proxy:3128",
    }  # fmt: skip
    secret = {"https_proxy": "http://me:secret@proxy:3128", "HTTP_PROXY": "me:secret@proxy", "UCX_X": "tcp://me@host"}
    captured = captured_environment({**kept, **secret, "PATH": "/bin"}, "/venv/bin/python")
    assert captured == {**kept, "PATH": "/venv/bin:/bin"}


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("0-1:30", 5400), ("1-0:0:1", 86401)],
)
def test_time_limits_as_slurm_reads_them(time: str, expected: int) -> None:
    assert seconds(time) == expected


def test_a_short_job_is_warned_later() -> None:
    assert [default_warning(time) for time in (None, "60", "4", "1")] == [120, 120, 60, 15]
    assert "B:USR1@15" in job(time="1").script()
    assert "--signal" not in job(time="1", warn_seconds=0).script()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes: 0 is too few; it must be between 1 and 100000"),
        (
            {"gpus_per_node": -1},
            "--gpus-per-node: '-1' is not valid; allowed: a number, or a type and a number (a100:4)",
        ),
        ({"gpus_per_node": "a100"}, "--gpus-per-node: 'a100' is not valid"),
        ({"gpus_per_node": "a100:4,v100:1"}, "--gpus-per-node: 'a100:4,v100:1' is not valid"),
        ({"ranks_per_node": 3, "gpus_per_node": "a100:2"}, "--ranks-per-node: 3 ranks need a GPU each"),
        ({"cpus_per_rank": 0}, "--cpus-per-rank: 0 is too few"),
        ({"ranks_per_node": 2**31}, "--ranks-per-node: 2147483648 is too many; it must be between 1 and 1024"),
        ({"nodes": 10**20}, "--nodes: 100000000000000000000 is too many"),
        ({"nodes": 100_000, "ranks_per_node": 1024}, "--nodes: 100000 nodes with 1024 ranks each make 102400000 ranks"),
        ({"gpus_per_node": 9999}, "--gpus-per-node: 9999 is too many; at most 1024 are allowed"),
        ({"cpus_per_rank": 10**6}, "--cpus-per-rank: 1000000 is too many"),
        ({"max_restarts": 10**20}, "--max-restarts: 100000000000000000000 is too many"),
        ({"time": "99999999"}, "--time: '99999999' is too long; at most 3650 days are allowed"),
        ({"time": "\u0663"}, "--time: '\u0663' is not a time limit"),
        ({"interface": "-x"}, "--interface: '-x' is not valid"),
        ({"partition": "p" * 1001}, "--partition: "),
        ({"name": "a\nb"}, "--job-name: 'a\\nb' is not valid"),
        ({"name": "--"}, "--job-name: '--' is not valid"),
        ({"max_restarts": -1}, "--max-restarts: -1 is too few"),
        ({"ranks_per_node": 3, "gpus_per_node": 2}, "--ranks-per-node: 3 ranks need a GPU each"),
        ({"time": "soon"}, "--time: 'soon' is not a time limit; write minutes"),
        ({"time": "0"}, "--time: '0' is not a time limit"),
        ({"time": "1\n"}, "--time: "),
        ({"name": "a b"}, "--job-name: 'a b' is not valid; allowed: up to 100 letters"),
        ({"name": "a\n#SBATCH --x"}, "--job-name: "),
        ({"partition": "a b"}, "--partition: 'a b' is not valid"),
        ({"interface": "ib0;reboot"}, "--interface: 'ib0;reboot' is not valid"),
        (
            {"interface": "^docker0"},
            "--interface: '^docker0' is not valid; allowed: interface names, separated",
        ),
        ({"interface": "=ib0"}, "--interface: '=ib0' is not valid"),
        ({"warn_seconds": -1}, "--warn-seconds: -1; it must be between 0"),
        (
            {"warn_seconds": 31, "time": "1"},
            "--warn-seconds: 31; it must be between 0 (no warning) and 30, half of --time",
        ),
        ({"options": ["account='x'"]}, "--sbatch: \"account='x'\" is not an sbatch option"),
        ({"options": ["account=x\n#SBATCH --nodes=9"]}, "--sbatch: "),
        ({"options": ["nodes=3"]}, "--sbatch: use --nodes to set nodes"),
        ({"options": ["wait"]}, "--sbatch: with wait, sbatch does not print the id"),
        ({"options": ["test-only"]}, "--sbatch: with test-only, sbatch does not print the id"),
        ({"options": ["array=1-3"]}, "--sbatch: array cannot be set"),
    ],
)
def test_invalid_values_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        job(**changes)
    assert str(caught.value).startswith(message)


def run_script(made: SlurmJob, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "job.sh"
    script.write_text(made.script())
    variables = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "2", **environment}
    return subprocess.run(["bash", script], env=variables, capture_output=True, text=True, check=False)


def test_restarts_are_limited_whoever_restarts_the_job(tmp_path: Path) -> None:
    done = run_script(job(max_restarts=2), tmp_path, SLURM_RESTART_COUNT="3")
    assert done.returncode == 1
    assert done.stdout == "cl-dist: job 17 on n1, restart 3 of at most 2\n"
    assert "Slurm has restarted this job 3 times, --max-restarts allows 2" in done.stderr


def test_a_folder_that_is_gone_ends_the_job(tmp_path: Path) -> None:
    done = run_script(job(working_folder=str(tmp_path / "gone")), tmp_path, SLURM_RESTART_COUNT="2")
    assert done.returncode == 1
    assert "gone: No such file or directory" in done.stderr
