#!/bin/sh
# Checks the prerequisites of the set-up and reports the first missing one. Usage: check_machine.sh PYTHON

python=$1

fail() {
    echo "cl_dist cannot be set up: $1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "$python is not installed. Install Python 3.10 or later (Debian: apt-get install python3 python3-venv python3-dev), or choose one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version 2>&1) is too old, Python 3.10 or later is required. Choose another one: make PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv. Install it (Debian: apt-get install python3-venv)"
"$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
    fail "the header files of $python (Python.h), which DeepSpeed compiles against, are missing. Install them (Debian: apt-get install python3-dev)"
command -v "${CXX:-c++}" >/dev/null 2>&1 ||
    fail "there is no C++ compiler (${CXX:-c++}), which DeepSpeed needs. Install one (Debian: apt-get install g++), or set the variable CXX"
