# What a static build needs in addition to install-tools.sh. To be read with `.`
# after `install_tools dist`: the Rust of the release with its libraries for
# musl, and zig as the C and C++ compiler for musl, because Debian has no C++
# compiler for it. All of it has fixed versions, and is under target/tools.
#
# shellcheck shell=sh
# install-tools.sh has set what is not set here.
# shellcheck disable=SC2154

# A release's bytes depend on the compiler.
cross_rust=1.95.0
cross_rustup=1.28.2
cross_rustup_x86_64=20a06e644b0d9bd2fbdbfd52d42540bdde820ea7df86e92e533c073da0cdd43c
cross_rustup_aarch64=e3853c5a252fca15252d07cb23a1bdd9377a8c6f3efa01531109281ae47f841c

# install_cross DIR TARGET...: installs into DIR. Afterwards, PATH has cargo,
# rustc and cargo-zigbuild, and cross_sysroot is Rust's directory.
install_cross() {
    cross_dir=$1
    shift
    as_builder mkdir -p "$cross_dir"
    cross_use_rust "$@"
    cross_use_zig
}

cross_use_rust() {
    cross_sysroot=$(as_builder rustc --print sysroot)
    cross_toolchain=${cross_sysroot##*/}
    if [ "$tools_rust_version" != "$cross_rust" ]; then
        say "a release is built with Rust $cross_rust, not $tools_rust_version:" \
            "installing that into ${cross_dir#"$PWD"/}"
        cross_install_rust
    fi
    for cross_target in "$@"; do
        [ ! -d "$cross_sysroot/lib/rustlib/$cross_target/lib" ] || continue
        cross_rustup_program=$(cross_find_rustup) || {
            # This is Debian's Rust, or another one without rustup.
            say "the Rust in $cross_sysroot has no libraries for $cross_target:" \
                "installing another into ${cross_dir#"$PWD"/}"
            cross_install_rust
            cross_rustup_program=$(cross_find_rustup)
        }
        say "adding $cross_target to the Rust in $cross_sysroot"
        as_builder "$cross_rustup_program" --quiet target add \
            --toolchain "$cross_toolchain" "$cross_target" ||
            die "could not add $cross_target to the Rust in $cross_sysroot"
    done
}

# Finds the rustup that cross_sysroot belongs to.
cross_find_rustup() {
    case $cross_sysroot in
    "$cross_dir"/*) echo "$cross_dir/cargo/bin/rustup" ;;
    */toolchains/*)
        for cross_path in "$tools_rust_dir/rustup" "$builder_home/.cargo/bin/rustup"; do
            if [ -x "$cross_path" ]; then
                echo "$cross_path"
                return 0
            fi
        done
        return 1
        ;;
    *) return 1 ;;
    esac
}

# Installs a Rust for this alone, and a rustup that knows only this one.
cross_install_rust() {
    RUSTUP_HOME=$cross_dir/rustup
    export RUSTUP_HOME
    cross_machine=$(uname -m)
    cross_toolchain=$cross_rust-$cross_machine-unknown-linux-gnu
    cross_sysroot=$RUSTUP_HOME/toolchains/$cross_toolchain
    if [ ! -x "$cross_sysroot/bin/cargo" ]; then
        case $cross_machine in
        x86_64) cross_sum=$cross_rustup_x86_64 ;;
        aarch64) cross_sum=$cross_rustup_aarch64 ;;
        *) die "releases are built on x86_64 or aarch64, not on $cross_machine" ;;
        esac
        cross_init=$cross_dir/rustup-init
        as_builder curl -sSf --retry 3 -o "$cross_init" \
            "https://static.rust-lang.org/rustup/archive/$cross_rustup/$cross_machine-unknown-linux-gnu/rustup-init" ||
            die "rustup $cross_rustup could not be fetched"
        echo "$cross_sum  $cross_init" | sha256sum --check --quiet ||
            die "the rustup that was fetched is not $cross_rustup"
        chmod +x "$cross_init"
        # Another Rust on this machine, Debian's for example, is no reason to
        # stop.
        as_builder env CARGO_HOME="$cross_dir/cargo" RUSTUP_INIT_SKIP_PATH_CHECK=yes \
            "$cross_init" -y --quiet --no-modify-path --profile minimal \
            --default-toolchain "$cross_rust" >/dev/null ||
            die "Rust $cross_rust could not be installed"
        rm "$cross_init"
    fi
    # The toolchain's own programs, so that crates stay in the builder's
    # ~/.cargo.
    PATH=$cross_sysroot/bin:$PATH
}

# The file records the requirements that it was made for.
cross_use_zig() {
    cross_venv=$cross_dir/venv
    if ! cmp -s packaging/requirements.txt "$cross_venv/installed.txt"; then
        say "installing zig and cargo-zigbuild into ${cross_dir#"$PWD"/}"
        rm -rf "$cross_venv"
        # cargo does not notice another compiler, and object files of two compilers
        # cannot be linked.
        rm -rf target/*-linux-musl
        # Debian's python3 is used, because another one on PATH may have no
        # venv.
        as_builder /usr/bin/python3 -m venv "$cross_venv" ||
            die "python3 could not make the virtual environment $cross_venv"
        as_builder "$cross_venv/bin/pip" --quiet --disable-pip-version-check install \
            --only-binary :all: --require-hashes -r packaging/requirements.txt ||
            die "zig and cargo-zigbuild could not be installed"
        as_builder cp packaging/requirements.txt "$cross_venv/installed.txt"
    fi
    PATH=$cross_venv/bin:$PATH
    export PATH
}

# cross_build TARGET: builds the program; $1 is Rust's name of the target.
#
# No paths of this machine get into the binary, neither Rust's in its panics nor
# gRPC's in its assertions.
cross_build() {
    # The builder's variables.
    # shellcheck disable=SC2016
    cross_cargo_home=$(as_builder sh -c 'echo "${CARGO_HOME:-$HOME/.cargo}"')
    cross_rust_flags="--remap-path-prefix=$cross_cargo_home/registry/src=/crates"
    cross_rust_flags="$cross_rust_flags --remap-path-prefix=$PWD=/build"
    cross_c_flags="-ffile-prefix-map=$cross_cargo_home/registry/src=/crates"
    cross_c_flags="$cross_c_flags -ffile-prefix-map=$PWD=/build"
    case $cross_cargo_home$PWD in
    *[[:space:]]*) die "cargo's home $cross_cargo_home and the checkout $PWD must have no blanks" ;;
    esac
    # Without the first definition, musl has no off64_t. New compilers reject a
    # line in gRPC's source without the other flag. -g0: cargo-zigbuild asks for
    # debug information, which takes a fifth of the time and is then thrown
    # away.
    cross_c_flags="-D_LARGEFILE64_SOURCE -g0 $cross_c_flags"
    # Nothing unwinds through C or C++ here: gRPC throws nothing, and a panic ends
    # in the Rust that gRPC calls. The tables for it are a seventh of the program.
    cross_c_flags="$cross_c_flags -fno-unwind-tables -fno-asynchronous-unwind-tables"
    # Features that rusqlite builds SQLite with and this program does not use: a
    # tenth of a megabyte each.
    cross_sqlite="-USQLITE_ENABLE_FTS3 -USQLITE_ENABLE_FTS3_PARENTHESIS -USQLITE_ENABLE_FTS5"
    cross_sqlite="$cross_sqlite -USQLITE_ENABLE_RTREE -USQLITE_ENABLE_DBSTAT_VTAB"
    # As in .cargo/config.toml, which this replaces.
    cross_sqlite="$cross_sqlite -DHAVE_FDATASYNC=1 -DSQLITE_DEFAULT_PCACHE_INITSZ=0"
    cross_suffix=$(echo "$1" | tr - _)
    # SOURCE_DATE_EPOCH is fixed: the binary contains no time, and if it changed
    # with each commit, gRPC would be built again each time.
    # PKG_CONFIG_LIBDIR keeps the build from finding this machine's libraries,
    # which are not for musl.
    as_builder env PATH="$PATH" ${RUSTUP_HOME:+"RUSTUP_HOME=$RUSTUP_HOME"} \
        PKG_CONFIG_LIBDIR=/nonexistent \
        ZIG_GLOBAL_CACHE_DIR="$cross_dir/zig-cache" \
        ZIG_LOCAL_CACHE_DIR="$cross_dir/zig-cache" \
        SOURCE_DATE_EPOCH=0 \
        RUSTFLAGS="$cross_rust_flags" LIBSQLITE3_FLAGS="$cross_sqlite" \
        "CFLAGS_$cross_suffix=$cross_c_flags" \
        "CXXFLAGS_$cross_suffix=$cross_c_flags -fno-exceptions -Wno-missing-template-arg-list-after-template-kw" \
        cargo zigbuild --quiet --profile dist --locked --target "$1" --target-dir "$PWD/target"
}
