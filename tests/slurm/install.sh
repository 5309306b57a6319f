#!/usr/bin/env bash
# Install what tests/slurm and the MPI tests need, where that is possible: as root, with apt. Ends well where it is not.
set -u
packages=(slurmctld slurmd slurm-client munge iproute2 util-linux openmpi-bin libopenmpi3)

missing=()
for package in "${packages[@]}"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests/slurm: ${missing[*]} not installed, and not installable here; the tests that need them are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# The packages must not start daemons: the tests start their own.
policy=/usr/sbin/policy-rc.d
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && trap 'rm -f $policy' EXIT; }
if ! { apt-get update && apt-get install --no-install-recommends -y "${missing[@]}"; } >/tmp/cl_dist-apt.log 2>&1; then
    echo "tests/slurm: apt-get could not install ${missing[*]}; the tests that need them are skipped"
    tail -n 3 /tmp/cl_dist-apt.log
fi
exit 0
