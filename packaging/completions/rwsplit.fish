# Made from the table of flags in src/config/flags.rs; a test holds the two equal.

complete -c rwsplit -f
complete -c rwsplit -n "not __fish_seen_subcommand_from status check doctor import mount umount" -a "status check doctor import mount umount"
complete -c rwsplit -n "__fish_seen_subcommand_from mount umount" -a "(__fish_complete_directories)"
complete -c rwsplit -l help
complete -c rwsplit -l version
complete -c rwsplit -l root-dir -x -a "(__fish_complete_directories)"
complete -c rwsplit -l writable-dir -x -a "(__fish_complete_directories)"
complete -c rwsplit -l state-dir -x -a "(__fish_complete_directories)"
complete -c rwsplit -l address -r -F
complete -c rwsplit -l require-mount
complete -c rwsplit -l writable-volatile
complete -c rwsplit -l reserve -x
complete -c rwsplit -l async-remove
complete -c rwsplit -l upperdir-label
complete -c rwsplit -l mount-option -x
complete -c rwsplit -l allow-lower -x -a "(__fish_complete_directories)"
complete -c rwsplit -l lower-for -x
complete -c rwsplit -l trust-labels-from -x -a "k8s.io"
complete -c rwsplit -l sync -x -a "commit none"
complete -c rwsplit -l record-digests
complete -c rwsplit -l relocate -x -a "background never"
complete -c rwsplit -l relocate-after -x
complete -c rwsplit -l quota -x -a "auto require off"
complete -c rwsplit -l quota-ids -x
complete -c rwsplit -l default-max-size -x
complete -c rwsplit -l default-max-inodes -x
complete -c rwsplit -l usage-max-age -x
complete -c rwsplit -l threads -x
complete -c rwsplit -l metrics-file -r -F
complete -c rwsplit -n "__fish_seen_subcommand_from status check doctor import" -l json
complete -c rwsplit -n "__fish_seen_subcommand_from check" -l deep
complete -c rwsplit -n "__fish_seen_subcommand_from check" -l heal
complete -c rwsplit -n "__fish_seen_subcommand_from check" -l containerd-address -r -F
complete -c rwsplit -n "__fish_seen_subcommand_from check" -l repair
complete -c rwsplit -n "__fish_seen_subcommand_from check" -l yes
complete -c rwsplit -n "__fish_seen_subcommand_from check" -l reset-writable
complete -c rwsplit -n "__fish_seen_subcommand_from doctor" -l containerd-config -r -F
complete -c rwsplit -n "__fish_seen_subcommand_from import" -l dry-run
complete -c rwsplit -n "__fish_seen_subcommand_from import" -l undo
complete -c rwsplit -n "__fish_seen_subcommand_from import" -l leave-out-missing
complete -c rwsplit -n "__fish_seen_subcommand_from mount" -l read-only
complete -c overlay-read-write-splitting-snapshotter -f
complete -c overlay-read-write-splitting-snapshotter -n "not __fish_seen_subcommand_from status check doctor import mount umount" -a "status check doctor import mount umount"
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from mount umount" -a "(__fish_complete_directories)"
complete -c overlay-read-write-splitting-snapshotter -l help
complete -c overlay-read-write-splitting-snapshotter -l version
complete -c overlay-read-write-splitting-snapshotter -l root-dir -x -a "(__fish_complete_directories)"
complete -c overlay-read-write-splitting-snapshotter -l writable-dir -x -a "(__fish_complete_directories)"
complete -c overlay-read-write-splitting-snapshotter -l state-dir -x -a "(__fish_complete_directories)"
complete -c overlay-read-write-splitting-snapshotter -l address -r -F
complete -c overlay-read-write-splitting-snapshotter -l require-mount
complete -c overlay-read-write-splitting-snapshotter -l writable-volatile
complete -c overlay-read-write-splitting-snapshotter -l reserve -x
complete -c overlay-read-write-splitting-snapshotter -l async-remove
complete -c overlay-read-write-splitting-snapshotter -l upperdir-label
complete -c overlay-read-write-splitting-snapshotter -l mount-option -x
complete -c overlay-read-write-splitting-snapshotter -l allow-lower -x -a "(__fish_complete_directories)"
complete -c overlay-read-write-splitting-snapshotter -l lower-for -x
complete -c overlay-read-write-splitting-snapshotter -l trust-labels-from -x -a "k8s.io"
complete -c overlay-read-write-splitting-snapshotter -l sync -x -a "commit none"
complete -c overlay-read-write-splitting-snapshotter -l record-digests
complete -c overlay-read-write-splitting-snapshotter -l relocate -x -a "background never"
complete -c overlay-read-write-splitting-snapshotter -l relocate-after -x
complete -c overlay-read-write-splitting-snapshotter -l quota -x -a "auto require off"
complete -c overlay-read-write-splitting-snapshotter -l quota-ids -x
complete -c overlay-read-write-splitting-snapshotter -l default-max-size -x
complete -c overlay-read-write-splitting-snapshotter -l default-max-inodes -x
complete -c overlay-read-write-splitting-snapshotter -l usage-max-age -x
complete -c overlay-read-write-splitting-snapshotter -l threads -x
complete -c overlay-read-write-splitting-snapshotter -l metrics-file -r -F
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from status check doctor import" -l json
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from check" -l deep
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from check" -l heal
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from check" -l containerd-address -r -F
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from check" -l repair
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from check" -l yes
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from check" -l reset-writable
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from doctor" -l containerd-config -r -F
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from import" -l dry-run
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from import" -l undo
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from import" -l leave-out-missing
complete -c overlay-read-write-splitting-snapshotter -n "__fish_seen_subcommand_from mount" -l read-only
