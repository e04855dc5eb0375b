//! Planning the mount that shows a snapshot.
//!
//! Owns: the type of the mount, its paths, and the order of its options. Other programs
//! parse the options, so the order is that of containerd's own overlay snapshotter
//! (`plugins/snapshots/overlay/overlay.go`, `mounts`). Pure: no I/O at all. All paths
//! come from a `MountPath`, which has no character that would end an option or a lower
//! directory.

use crate::types::{Kind, Mount, SnapshotPaths};

/// A snapshot to be mounted.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// The snapshot's own directories.
    pub own: &'a SnapshotPaths,
    /// The layers below the snapshot, nearest first. All paths are in `<root>/snapshots`,
    /// also for layers whose bytes are on the writable volume: the mounting program
    /// shortens long lists by their common directory, and id-maps that directory as one
    /// mount.
    pub lowers: &'a [String],
    /// Host directories above the layers and beneath the snapshot's own directory, the
    /// topmost first. The paths are links below `<root>`, so that the mounting program can
    /// shorten a long list.
    pub host_dirs: &'a [String],
    /// The empty directory, `<root>/empty`.
    pub empty: &'a str,
    /// Whether a snapshot without a parent is an overlay over the empty directory
    /// rather than a bind mount. containerd writes the whiteouts of overlayfs
    /// only when it unpacks onto an overlay mount (containerd
    /// `core/diff/apply/apply_linux.go`).
    pub over_empty: bool,
    /// Options of an overlay after `lowerdir=`, for example `index=off`.
    pub options: &'a [String],
    /// `uidmap=` and `gidmap=`, if the container's ids are mapped.
    pub id_options: &'a [String],
}

/// Plans the mounts of a snapshot: always exactly one.
pub fn plan_mounts(plan: &Plan<'_>) -> Vec<Mount> {
    let is_view = plan.kind == Kind::View;
    let is_plain = plan.host_dirs.is_empty();
    let mount = match plan.lowers {
        [] if is_plain && !plan.over_empty => {
            bind(plan.own.upper.clone(), is_view, plan.id_options)
        }
        [lower] if is_plain && is_view => bind(lower.clone(), is_view, plan.id_options),
        lowers => overlay(plan, lowers, is_view),
    };
    vec![mount]
}

fn bind(source: String, is_view: bool, id_options: &[String]) -> Mount {
    let mut options = id_options.to_vec();
    options.push(if is_view { "ro" } else { "rw" }.to_owned());
    options.push("rbind".to_owned());
    Mount {
        fs_type: "bind",
        source,
        options,
    }
}

fn overlay(plan: &Plan<'_>, lowers: &[String], is_view: bool) -> Mount {
    let mut options = plan.id_options.to_vec();
    if !is_view {
        options.push(format!("workdir={}", plan.own.work));
        options.push(format!("upperdir={}", plan.own.upper));
    }
    let mut paths = plan.host_dirs.to_vec();
    paths.extend_from_slice(lowers);
    // An overlay needs one lower directory, or two if it has no upper one
    // (overlayfs.rst, "Multiple lower layers").
    if lowers.is_empty() && (paths.is_empty() || is_view) {
        paths.push(plan.empty.to_owned());
    }
    options.push(format!("lowerdir={}", paths.join(":")));
    options.extend_from_slice(plan.options);
    Mount {
        fs_type: "overlay",
        source: "overlay".to_owned(),
        options,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(
        kind: Kind,
        lowers: &[u64],
        over_empty: bool,
        ids: &[&str],
    ) -> (String, Vec<String>) {
        planned_with(&[], kind, lowers, over_empty, ids)
    }

    fn planned_with(
        extras: &[&str],
        kind: Kind,
        lowers: &[u64],
        over_empty: bool,
        ids: &[&str],
    ) -> (String, Vec<String>) {
        let extras: Vec<_> = extras.iter().map(ToString::to_string).collect();
        let layer = |id: &u64| format!("/root/snapshots/{id}/fs");
        let lowers: Vec<_> = lowers.iter().map(layer).collect();
        let own = SnapshotPaths {
            upper: "/fast/snapshots/9/fs".to_owned(),
            work: "/fast/snapshots/9/work".to_owned(),
        };
        let id_options: Vec<_> = ids.iter().map(ToString::to_string).collect();
        let plan = Plan {
            kind,
            own: &own,
            lowers: &lowers,
            host_dirs: &extras,
            empty: "/root/empty",
            over_empty,
            options: &["index=off".to_owned(), "metacopy=on".to_owned()],
            id_options: &id_options,
        };
        let mut mounts = plan_mounts(&plan);
        assert_eq!(mounts.len(), 1);
        let mount = mounts.remove(0);
        (format!("{} {}", mount.fs_type, mount.source), mount.options)
    }

    #[test]
    fn without_parent_it_is_a_bind_of_the_snapshot_itself() {
        let (what, options) = planned(Kind::Active, &[], false, &[]);
        assert_eq!(what, "bind /fast/snapshots/9/fs");
        assert_eq!(options, ["rw", "rbind"]);
        let (what, options) = planned(Kind::View, &[], false, &[]);
        assert_eq!(what, "bind /fast/snapshots/9/fs");
        assert_eq!(options, ["ro", "rbind"]);
    }

    #[test]
    fn a_view_of_one_layer_is_a_bind_of_that_layer() {
        let (what, options) = planned(Kind::View, &[4], false, &[]);
        assert_eq!(what, "bind /root/snapshots/4/fs");
        assert_eq!(options, ["ro", "rbind"]);
    }

    #[test]
    fn an_active_snapshot_is_an_overlay_newest_lower_first() {
        let (what, options) = planned(Kind::Active, &[7, 4, 1], false, &[]);
        assert_eq!(what, "overlay overlay");
        assert_eq!(
            options,
            [
                "workdir=/fast/snapshots/9/work",
                "upperdir=/fast/snapshots/9/fs",
                "lowerdir=/root/snapshots/7/fs:/root/snapshots/4/fs:/root/snapshots/1/fs",
                "index=off",
                "metacopy=on",
            ]
        );
        assert_eq!(planned(Kind::Active, &[4], false, &[]).0, "overlay overlay");
    }

    #[test]
    fn a_view_of_several_layers_has_no_upper() {
        let (what, options) = planned(Kind::View, &[7, 4], false, &[]);
        assert_eq!(what, "overlay overlay");
        assert_eq!(
            options,
            [
                "lowerdir=/root/snapshots/7/fs:/root/snapshots/4/fs",
                "index=off",
                "metacopy=on"
            ]
        );
    }

    #[test]
    fn an_unpack_without_parent_is_an_overlay_over_nothing() {
        let (what, options) = planned(Kind::Active, &[], true, &[]);
        assert_eq!(what, "overlay overlay");
        assert_eq!(options[2], "lowerdir=/root/empty");
    }

    #[test]
    fn extras_are_above_the_layers_in_the_order_given() {
        let extras = ["/root/lowers/9.0", "/root/lowers/9.1"];
        let table: [(Kind, &[u64], &str); 5] = [
            (
                Kind::Active,
                &[7, 4],
                ":/root/snapshots/7/fs:/root/snapshots/4/fs",
            ),
            (
                Kind::View,
                &[7, 4],
                ":/root/snapshots/7/fs:/root/snapshots/4/fs",
            ),
            // Without `over_empty`, these are bind mounts.
            (Kind::View, &[4], ":/root/snapshots/4/fs"),
            (Kind::Active, &[], ""),
            (Kind::View, &[], ":/root/empty"),
        ];
        for (kind, lowers, rest) in table {
            let (what, options) = planned_with(&extras, kind, lowers, false, &[]);
            assert_eq!(what, "overlay overlay");
            let lowerdir = format!("lowerdir=/root/lowers/9.0:/root/lowers/9.1{rest}");
            let own = [
                "workdir=/fast/snapshots/9/work",
                "upperdir=/fast/snapshots/9/fs",
            ];
            let own = if kind == Kind::View { &[][..] } else { &own };
            let expected = [own, &[lowerdir.as_str(), "index=off", "metacopy=on"]].concat();
            assert_eq!(options, expected, "{kind} on {lowers:?}");
        }
        let (_, options) = planned_with(&extras[..1], Kind::View, &[], false, &[]);
        assert_eq!(options[0], "lowerdir=/root/lowers/9.0:/root/empty");
    }

    #[test]
    fn id_maps_come_first() {
        let ids = ["uidmap=0:1000:10", "gidmap=0:2000:10"];
        for (kind, lowers) in [
            (Kind::Active, &[][..]),
            (Kind::Active, &[3]),
            (Kind::View, &[3]),
            (Kind::View, &[5, 3]),
        ] {
            let (_, options) = planned(kind, lowers, false, &ids);
            assert_eq!(options[..2], ids, "{kind} on {lowers:?}");
        }
    }
}
