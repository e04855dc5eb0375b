#compdef rwsplit overlay-read-write-splitting-snapshotter
# Made from the table of flags in src/config/flags.rs; a test holds the two equal.

_arguments \
    '--root-dir=:directory:_files -/' \
    '--writable-dir=:directory:_files -/' \
    '--state-dir=:directory:_files -/' \
    '--address=:path:_files' \
    '--require-mount' \
    '--writable-volatile' \
    '--reserve=:value: ' \
    '--async-remove=-:value:(true false)' \
    '--upperdir-label=-:value:(true false)' \
    '*--mount-option=:value: ' \
    '*--allow-lower=:directory:_files -/' \
    '*--lower-for=:value: ' \
    '--trust-labels-from=:value:(k8s.io)' \
    '--sync=:value:(commit none)' \
    '--record-digests' \
    '--relocate=:value:(background never)' \
    '--relocate-after=:value: ' \
    '--quota=:value:(auto require off)' \
    '--quota-ids=:value: ' \
    '--default-max-size=:value: ' \
    '--default-max-inodes=:value: ' \
    '--usage-max-age=:value: ' \
    '--threads=:value: ' \
    '--metrics-file=:path:_files' \
    '--json' \
    '--deep' \
    '--heal' \
    '--containerd-address=:path:_files' \
    '--repair' \
    '--yes' \
    '--reset-writable' \
    '--containerd-config=:path:_files' \
    '--dry-run' \
    '--undo' \
    '--leave-out-missing' \
    '--read-only' \
    --help \
    --version \
    '1:command:(status check doctor import mount umount)' \
    '*:directory:_files -/'
