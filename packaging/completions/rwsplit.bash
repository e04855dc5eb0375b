# shellcheck shell=bash
# Made from the table of flags in src/config/flags.rs; a test holds the two equal.

_rwsplit_words() {
    # Words without blanks.
    # shellcheck disable=SC2207
    COMPREPLY=($(compgen -W "$1" -- "$cur"))
}

_rwsplit_names() {
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

_rwsplit() {
    local cur=${COMP_WORDS[COMP_CWORD]} at=$((COMP_CWORD - 1)) command='' word words
    COMPREPLY=()
    # bash takes --flag=value for three words.
    if [ "$cur" = = ]; then
        cur=
    elif [ "${COMP_WORDS[at]}" = = ]; then
        at=$((at - 1))
    fi
    case ${COMP_WORDS[at]} in
    --root-dir | --writable-dir | --state-dir | --allow-lower) _rwsplit_names -d ;;
    --address | --metrics-file | --containerd-address | --containerd-config) _rwsplit_names -f ;;
    --async-remove | --upperdir-label) _rwsplit_words "true false" ;;
    --trust-labels-from) _rwsplit_words "k8s.io" ;;
    --sync) _rwsplit_words "commit none" ;;
    --relocate) _rwsplit_words "background never" ;;
    --quota) _rwsplit_words "auto require off" ;;
    --reserve | --mount-option | --lower-for | --relocate-after | --quota-ids | --default-max-size | --default-max-inodes | --usage-max-age | --threads) ;;
    *)
        for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
            case $word in
            status | check | doctor | import | mount | umount) command=$word ;;
            esac
        done
        case $command in
        '') words="status check doctor import mount umount --root-dir --writable-dir --state-dir --address --require-mount --writable-volatile --reserve --async-remove --upperdir-label --mount-option --allow-lower --lower-for --trust-labels-from --sync --record-digests --relocate --relocate-after --quota --quota-ids --default-max-size --default-max-inodes --usage-max-age --threads --metrics-file --help --version" ;;
        status) words="--root-dir --writable-dir --state-dir --address --require-mount --writable-volatile --reserve --async-remove --upperdir-label --mount-option --allow-lower --lower-for --trust-labels-from --sync --record-digests --relocate --relocate-after --quota --quota-ids --default-max-size --default-max-inodes --usage-max-age --threads --metrics-file --json" ;;
        check) words="--root-dir --writable-dir --state-dir --address --require-mount --writable-volatile --reserve --async-remove --upperdir-label --mount-option --allow-lower --lower-for --trust-labels-from --sync --record-digests --relocate --relocate-after --quota --quota-ids --default-max-size --default-max-inodes --usage-max-age --threads --metrics-file --json --deep --heal --containerd-address --repair --yes --reset-writable" ;;
        doctor) words="--root-dir --writable-dir --state-dir --address --require-mount --writable-volatile --reserve --async-remove --upperdir-label --mount-option --allow-lower --lower-for --trust-labels-from --sync --record-digests --relocate --relocate-after --quota --quota-ids --default-max-size --default-max-inodes --usage-max-age --threads --metrics-file --json --containerd-config" ;;
        import) words="--root-dir --writable-dir --state-dir --address --require-mount --writable-volatile --reserve --async-remove --upperdir-label --mount-option --allow-lower --lower-for --trust-labels-from --sync --record-digests --relocate --relocate-after --quota --quota-ids --default-max-size --default-max-inodes --usage-max-age --threads --metrics-file --json --dry-run --undo --leave-out-missing" ;;
        mount) words="--root-dir --writable-dir --state-dir --address --require-mount --writable-volatile --reserve --async-remove --upperdir-label --mount-option --allow-lower --lower-for --trust-labels-from --sync --record-digests --relocate --relocate-after --quota --quota-ids --default-max-size --default-max-inodes --usage-max-age --threads --metrics-file --read-only" ;;
        umount) words="" ;;
        esac
        case $command/$cur in
        mount/[!-]* | umount/[!-]* | umount/) _rwsplit_names -d ;;
        *) _rwsplit_words "$words" ;;
        esac
        ;;
    esac
}

complete -F _rwsplit rwsplit overlay-read-write-splitting-snapshotter
