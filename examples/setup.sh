#!/usr/bin/env bash
# Creates .venv at the top of the clone with everything EMKUM needs; quick when nothing has changed.
#
#   bash examples/setup.sh           set up, then return
#   bash examples/setup.sh --find    only print the interpreter that .venv would be built with
#   source examples/setup.sh         set up, and put .venv/bin first on PATH (what the other scripts do)
#
# EMKUM_PYTHON     interpreter to use (Python 3.12 or 3.11); where unset, a working 3.12 is looked for, then 3.11
# EMKUM_PIP_ARGS   further arguments for pip, separated by spaces, for example an index of CPU builds

_emkum_say() { echo "setup: $*" >&2; }
_emkum_fail() { echo "emkum: error: $*" >&2; return 1; }

# Prints "3.12.1" when interpreter $1 runs, is 3.12 or 3.11 and can build this environment; fails otherwise.
# A candidate that merely exists says little: it may be a shim that refuses, or come without venv or ensurepip.
# On 3.11 fairseq-fixed is compiled, which needs the headers.
_emkum_probe() {
    "$1" -c '
import ensurepip, os, sys, sysconfig, venv
if sys.version_info[:2] not in ((3, 12), (3, 11)):
    sys.exit(1)
if sys.version_info[:2] == (3, 11) and not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null
}

# Prints the candidates for Python $1, best first, one a line.
_emkum_candidates() {
    local folder
    type -aP "python$1"
    for folder in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        if [ -n "$folder" ]; then compgen -G "$folder/versions/$1*/bin/python"; fi
    done
    compgen -G "${HOME:-}/.local/share/uv/python/cpython-$1*/bin/python3"
    type -aP python3 python
    return 0
}

# Prints the path of the interpreter to build .venv with, or fails with one line.
_emkum_find_python() {
    local version candidate
    if [ -n "${EMKUM_PYTHON:-}" ]; then
        if ! _emkum_probe "$EMKUM_PYTHON" >/dev/null; then
            _emkum_fail "EMKUM_PYTHON=$EMKUM_PYTHON is no working Python 3.12 or 3.11 with venv and ensurepip" \
                "(on 3.11 also the headers)"
            return 1
        fi
        echo "$EMKUM_PYTHON"
        return 0
    fi
    for version in 3.12 3.11; do
        while IFS= read -r candidate; do
            case "$(_emkum_probe "$candidate")" in
                "$version".*) echo "$candidate"; return 0 ;;
            esac
        done < <(_emkum_candidates "$version" 2>/dev/null)
    done
    _emkum_fail "no working Python 3.12 or 3.11 with venv and ensurepip (on 3.11 also the headers) was found;" \
        "install one (Debian: python3.12-venv) or point EMKUM_PYTHON at it"
}

# Prints the Python version of $1/.venv, without starting it.
_emkum_venv_version() {
    sed -n 's/^version *= *//p' "$1/.venv/pyvenv.cfg" 2>/dev/null
}

# Prints what .venv must have been built from: the requirements, the Python, and the place, which a copied clone changes.
_emkum_stamp() {
    echo "$(cksum <"$1/setup.py") python $(_emkum_venv_version "$1") at $1"
}

_emkum_is_ready() {
    [ -x "$1/.venv/bin/python" ] && [ "$(cat "$1/.venv/emkum-stamp" 2>/dev/null)" = "$(_emkum_stamp "$1")" ]
}

# Copies pip's output from standard input to log $1, and shows the lines that tell of progress.
_emkum_progress() {
    local line file
    while IFS= read -r line; do
        echo "$line" >>"$1"
        case "$line" in
            *Downloading*" MB)"|*"Using cached"*" MB)")
                line="${line#"${line%%[![:space:]]*}"}"
                file="${line#Downloading }"
                file="${file#Using cached }"
                _emkum_say "  ${file##*/}" ;;
            "Building wheels for collected packages: "*) _emkum_say "  building ${line#*: }" ;;
            "Installing collected packages: "*) _emkum_say "  installing what was downloaded" ;;
        esac
    done
}

# Runs pip in .venv; all of its output goes to .venv/emkum-setup.log.
_emkum_pip() {
    local root="$1" extra=() status
    shift
    IFS=' ' read -ra extra <<<"${EMKUM_PIP_ARGS:-}"
    "$root/.venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        ${extra[@]+"${extra[@]}"} "$@" 2>&1 </dev/null | _emkum_progress "$root/.venv/emkum-setup.log"
    status="${PIPESTATUS[0]}"
    if [ "$status" -ne 0 ]; then
        tail -n 15 "$root/.venv/emkum-setup.log" >&2
        _emkum_fail "pip failed; all of its output is in $root/.venv/emkum-setup.log"
        return 1
    fi
}

# fairseq-fixed has no wheel for 3.11. Built in isolation it would download torch once more, of any version;
# so torch and the build tools go in first.
_emkum_compile_fairseq() {
    local root="$1" torch fairseq
    torch="$(grep -oE 'torch==[0-9.]+' "$root/setup.py" | head -n 1)"
    fairseq="$(grep -oE 'fairseq-fixed==[0-9.]+' "$root/setup.py" | head -n 1)"
    if "$root/.venv/bin/python" -m pip freeze 2>/dev/null | grep -qx "$fairseq"; then return 0; fi
    _emkum_say "Python 3.11: $fairseq is compiled here, which takes some minutes more and needs a C++ compiler"
    _emkum_pip "$root" "$torch" 'setuptools<82' wheel cython numpy || return 1
    _emkum_pip "$root" --no-build-isolation "$fairseq"
}

# Creates $1/.venv anew, empty but for pip.
_emkum_create() {
    local root="$1" python
    python="$(_emkum_find_python)" || return 1
    _emkum_say "creating .venv with $python ($(_emkum_probe "$python"))"
    "$python" -m venv --clear "$root/.venv" || _emkum_fail "$python could not create $root/.venv"
}

# Installs into $1/.venv, then proves that what is hardest to fit together can be imported.
_emkum_fill() {
    local root="$1" version alone
    version="$(_emkum_venv_version "$root")"
    case "$version" in
        3.12.*) ;;
        3.11.*) _emkum_compile_fairseq "$root" || return 1 ;;
        *) _emkum_fail "$root/.venv has Python $version, not 3.12 or 3.11; remove it"; return 1 ;;
    esac
    _emkum_say "installing the requirements into .venv (the first time takes minutes and about 5 GB)"
    _emkum_pip "$root" -e "$root[test]" || return 1
    alone="$(grep -oE 'torchscale==[0-9.]+' "$root/setup.py" | head -n 1)" || true
    if [ -n "$alone" ]; then _emkum_pip "$root" --no-deps "$alone" || return 1; fi
    "$root/.venv/bin/python" -W ignore -c 'import fairseq, timm, torchaudio, torchvision' \
        >>"$root/.venv/emkum-setup.log" 2>&1 </dev/null \
        || _emkum_fail "the packages in $root/.venv do not work together; see $root/.venv/emkum-setup.log"
}

# Creates, completes or updates $1/.venv. The stamp is written last, so that a run that was interrupted is taken up
# again; what it left is used where it works (a download of gigabytes) and thrown away where it does not.
_emkum_install() {
    local root="$1" start=$SECONDS interrupted=""
    if [ -e "$root/.venv/emkum-unfinished" ]; then
        interrupted=1
        _emkum_say "completing an earlier set-up that was interrupted"
    fi
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        interrupted=""
        _emkum_create "$root" || return 1
    fi
    touch "$root/.venv/emkum-unfinished"
    if ! _emkum_fill "$root"; then
        if [ -z "$interrupted" ]; then return 1; fi
        _emkum_say "starting again from an empty .venv"
        _emkum_create "$root" && touch "$root/.venv/emkum-unfinished" && _emkum_fill "$root" || return 1
    fi
    _emkum_stamp "$root" >"$root/.venv/emkum-stamp" && rm -f "$root/.venv/emkum-unfinished"
    _emkum_say "ready after $((SECONDS - start)) s"
}

# EMKUM_PYTHON of another version than an existing .venv is a contradiction that the user must settle.
_emkum_check_choice() {
    local root="$1" wanted have
    if [ -z "${EMKUM_PYTHON:-}" ]; then return 0; fi
    have="$(_emkum_venv_version "$root")"
    if [ -z "$have" ]; then return 0; fi
    wanted="$(_emkum_probe "$(_emkum_find_python)")" || return 1
    if [ "${wanted%.*}" != "${have%.*}" ]; then
        _emkum_fail "$root/.venv has Python $have but EMKUM_PYTHON is $wanted; remove .venv to change over"
    fi
}

# Sets up the clone at $1. Two at once wait for one another where flock exists.
emkum_setup() {
    local root="$1"
    _emkum_check_choice "$root" || return 1
    if _emkum_is_ready "$root"; then return 0; fi
    (
        if command -v flock >/dev/null; then
            flock -n 9 || { _emkum_say "waiting for another set-up of this clone"; flock 9; }
        fi
        _emkum_is_ready "$root" || _emkum_install "$root"
    ) 9>"$root/.venv.lock"
}

_emkum_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ "${BASH_SOURCE[0]}" != "$0" ]; then
    emkum_setup "$_emkum_root" || return 1
    export VIRTUAL_ENV="$_emkum_root/.venv"
    export PATH="$_emkum_root/.venv/bin:$PATH"
elif [ "${1:-}" = --find ]; then
    _emkum_find_python
else
    emkum_setup "$_emkum_root"
fi
