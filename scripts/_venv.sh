# Sourced by test.sh and quickstart.sh: make_venv EXTRA leaves the repository's .venv installed with that extra.

# Idle OpenMP threads sleep instead of spinning. On cores shared with other work a spinning thread takes the time slice that the one
# it waits for needs: measured on 2 cores with a load of 10, training a small model was 8 times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# Says early what a failure deep inside pip would not.
check_python() {
    local python=$1
    if ! command -v "$python" >/dev/null 2>&1; then
        echo "error: '$python' not found. Set PYTHON to a Python >= 3.10, e.g. PYTHON=python3.12 $0" >&2
        return 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $("$python" --version 2>&1) is too old: Python >= 3.10 is needed. Set PYTHON, e.g. PYTHON=python3.12 $0" >&2
        return 1
    fi
}

# make_venv EXTRA: runs in the repository root.
make_venv() {
    local extra=$1 python=${PYTHON:-python3}
    # A half-made .venv (no pip in it) is made again; a good one is kept, whatever python3 now is.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        check_python "$python"
        "$python" -m venv --clear .venv
    fi
    # Skip pip where nothing changed since this extra was last installed: the second run of a command starts at once.
    local stamp=.venv/.installed-$extra
    if [[ -f $stamp && $stamp -nt setup.cfg && $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]]; then
        return 0
    fi
    # torch comes first, alone and by its exact pin: a CPU build (2.13.0+cpu) that satisfies the pin is then taken or kept. Left to
    # the resolver as a dependency, pip may choose another release and with it gigabytes of CUDA packages.
    local torch_pin
    torch_pin=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
    .venv/bin/python -m pip install "$torch_pin"
    .venv/bin/python -m pip install -c constraints.txt -e ".[$extra]"
    touch "$stamp"
}

# DeepSpeed on CPU, for the tests of its engines: no compiled operators, and none of the CUDA packages that pip's resolver
# could choose for it. It is a source package whose build imports torch, hence no isolation.
install_deepspeed() {
    local stamp=.venv/.installed-deepspeed
    if [[ -f $stamp && $stamp -nt constraints.txt ]]; then
        return 0
    fi
    .venv/bin/python -m pip install -c constraints.txt setuptools einops hjson msgpack py-cpuinfo pydantic
    DS_BUILD_OPS=0 .venv/bin/python -m pip install -c constraints.txt --no-deps --no-build-isolation deepspeed
    touch "$stamp"
}

# Triton for the tests of the GPU kernel on CPU. torch's CUDA builds bring their own; there is none but for Linux. It is no part
# of constraints.txt, where its version would have to be that of every torch. The tests skip themselves without it.
install_triton() {
    if [[ $(uname -s) == Linux ]] && ! .venv/bin/python -c 'import triton' 2>/dev/null; then
        .venv/bin/python -m pip install --no-deps triton==3.9.0 || echo "warning: triton could not be installed" >&2
    fi
}
