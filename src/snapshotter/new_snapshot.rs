//! A request to prepare or view a snapshot, parsed once into everything that it asks for.
//!
//! Owns: what a snapshot is for, where its labels come from, and which volume its
//! directory goes to. Never: I/O, except for one read of the parent's labels.
//!
//! An unpack will become an image layer, and so belongs on the image volume, whatever
//! labels its image gives it. containerd marks an unpack in two ways, and some of its
//! clients use only one: by a label that names the future layer, and by a key that
//! begins with `extract-` (`core/snapshots/snapshotter.go`, `UnpackKeyPrefix`). In
//! the namespace of pods only the key counts, because a pod's annotation can be that
//! label. A container writes to every other active snapshot.

use super::Options;
use super::host_dirs::{WantedHostDirs, chosen_by};
use super::label_source::{LabelSource, is_of_pods};
use super::labels::{self, IdMaps};
use super::limits::Asked;
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::store::New;
use crate::types::{Info, Kind, LABEL_SNAPSHOT_REF, LABEL_VOLUME, Labels, Limits, Quoted, Volume};

/// What a snapshot is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A layer of an image is unpacked into the snapshot, or containerd changes the owners
    /// of an image's files in it for a user namespace.
    Unpack,
    /// A container, or a build, writes to the snapshot.
    Container,
    /// Nothing is written to the snapshot.
    View,
}

impl Purpose {
    pub(super) fn of(kind: Kind, key: &str, labels: &Labels) -> Purpose {
        let is_unpack = own_part(key).starts_with("extract-")
            || is_remap(key)
            || !is_of_pods(key) && labels.contains_key(LABEL_SNAPSHOT_REF);
        match kind {
            Kind::View | Kind::Committed => Purpose::View,
            Kind::Active if is_unpack => Purpose::Unpack,
            Kind::Active => Purpose::Container,
        }
    }

    /// What an existing snapshot is for.
    pub(super) fn of_stored(info: &Info) -> Purpose {
        Purpose::of(info.kind, &info.name, &info.labels)
    }
}

/// The part of a key that containerd's client has chosen. containerd puts
/// `<namespace>/<number>/` in front of this part; a client without containerd may use any
/// prefix, or none.
fn own_part(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

/// Whether a key is that of a snapshot in which containerd changes the owners of an image's
/// files for a user namespace, and which it then commits
/// (`client/snapshotter_opts_unix.go`, `resolveSnapshotOptions`). No image can choose a
/// key.
pub(super) fn is_remap(key: &str) -> bool {
    own_part(key).ends_with("-remap")
}

/// A snapshot that a request asks for.
#[derive(Debug)]
pub(super) struct NewSnapshot<'a> {
    pub kind: Kind,
    pub key: &'a str,
    /// The parent's name; empty if there is no parent.
    pub parent: &'a str,
    /// The labels of the request that count, and are stored.
    pub labels: Labels,
    pub label_source: LabelSource,
    /// The keys of labels in the request that do not count.
    pub ignored: Vec<&'static str>,
    pub purpose: Purpose,
    /// Where the snapshot's directory goes; `None` for a view with a parent, which
    /// only shows the parent's directories.
    pub volume: Option<Volume>,
    pub id_maps: Option<IdMaps>,
    /// How much the snapshot may take; `None` if it gets no project.
    pub limits: Option<Limits>,
    pub host_dirs: WantedHostDirs,
}

impl<'a> NewSnapshot<'a> {
    /// Parses a request. `parent_labels` reads the labels of the parent; it is called only
    /// for a container, if rules may choose host directories for its image.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] for a bad key, label, host directory or id mapping;
    /// [`ErrorKind::FailedPrecondition`] for a limit on the image volume.
    pub(super) fn plan(
        kind: Kind,
        key: &'a str,
        parent: &'a str,
        labels: Labels,
        options: &Options,
        parent_labels: impl FnOnce() -> Result<Option<Labels>>,
    ) -> Result<NewSnapshot<'a>> {
        labels::check_key("key", key)?;
        let mut labels = labels::check_labels(labels)?;
        let purpose = Purpose::of(kind, key, &labels);
        let label_source = LabelSource::of(kind, purpose, key, options.pod_labels);
        let ignored = label_source.take_ignored(&mut labels);
        let id_maps = IdMaps::from_labels(&labels)?;
        if let Some(maps) = &id_maps {
            maps.root()?;
        }
        let volume = choose_volume(purpose, &labels)?;
        let volume = (kind == Kind::Active || parent.is_empty()).then_some(volume);
        let asked = Asked::of(label_source, &labels, options.quota.default)?;
        let limits = plan_limits(purpose, volume, asked, options.quota.default)?;
        let mut host_dirs = WantedHostDirs::by_label(&labels)?;
        let has_rules = !options.lower_rules.is_empty();
        if has_rules
            && purpose == Purpose::Container
            && !parent.is_empty()
            && let Some(labels) = parent_labels()?
        {
            host_dirs.chosen = chosen_by(&options.lower_rules, &labels);
        }
        host_dirs.require_plain_ids(id_maps.as_ref())?;
        Ok(NewSnapshot {
            kind,
            key,
            parent,
            labels,
            label_source,
            ignored,
            purpose,
            volume,
            id_maps,
            limits,
            host_dirs,
        })
    }

    /// The snapshot in the form in which the database enters it.
    pub(super) fn row(&self) -> New<'_> {
        New {
            kind: self.kind,
            key: self.key,
            parent: self.parent,
            labels: &self.labels,
            volume: self.volume,
        }
    }
}

fn choose_volume(purpose: Purpose, labels: &Labels) -> Result<Volume> {
    match labels.get(LABEL_VOLUME).map(String::as_str) {
        Some("image") => Ok(Volume::Image),
        Some("writable") => Ok(Volume::Writable),
        Some(other) => Err(Error::invalid(format!(
            "label {LABEL_VOLUME} is {}, it has to be \"image\" or \"writable\"",
            Quoted(other)
        ))),
        None if purpose == Purpose::Container => Ok(Volume::Writable),
        None => Ok(Volume::Image),
    }
}

/// How much a snapshot may take; `None` if it gets no project.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] for a limit on the image volume.
pub(super) fn plan_limits(
    purpose: Purpose,
    volume: Option<Volume>,
    asked: Asked,
    default: Limits,
) -> Result<Option<Limits>> {
    match (purpose, volume) {
        (Purpose::Container, Some(Volume::Writable)) => Ok(Some(asked.or(default))),
        (Purpose::Container, _) if asked.is_limit() => Err(Error::refused(format!(
            "the snapshot's labels ask for a limit, which is enforced on the writable volume only, \
             and {LABEL_VOLUME} puts the snapshot on the image volume: leave one of these labels \
             out"
        ))),
        _ => Ok(None),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::super::labels::tests::labels;
    use super::*;
    use crate::error::ErrorKind;
    use crate::host_dirs::{ImageRule, Policy};
    use crate::quota::ProjectRange;
    use crate::snapshotter::{PodLabels, QuotaMode, QuotaOptions, Relocation, SyncMode};
    use crate::types::{
        LABEL_GID_MAPPING, LABEL_IMAGE_REF, LABEL_LOWERS, LABEL_OWN_MAX_SIZE, LABEL_UID_MAPPING,
    };
    use crate::volume::Reserve;

    const UIDS: (&str, &str) = (LABEL_UID_MAPPING, "0:1000:10");
    const GIDS: (&str, &str) = (LABEL_GID_MAPPING, "0:1000:10");

    /// Options with a default limit, and with a rule that gives containers of images named
    /// `ruled` the host directory `/rule`.
    pub fn options() -> Options {
        Options {
            mount_options: Vec::new(),
            removes_at_once: false,
            sync: SyncMode::AtCommit,
            records_digests: false,
            relocation: Relocation::Never,
            reserve: Reserve::Bytes(0),
            shows_upperdir: false,
            quota: QuotaOptions {
                mode: QuotaMode::Auto,
                ids: ProjectRange::DEFAULT,
                default: Limits {
                    max_bytes: Some(5 << 20),
                    max_inodes: None,
                },
                usage_max_age: Duration::ZERO,
            },
            lowers: Policy::default(),
            lower_rules: vec![ImageRule::parse("ruled=/rule").unwrap()],
            pod_labels: PodLabels::Ignored,
        }
    }

    fn plan<'a>(
        kind: Kind,
        key: &'a str,
        parent: &'a str,
        pairs: &[(&str, &str)],
    ) -> Result<NewSnapshot<'a>> {
        let parent_labels = || Ok(Some(labels(&[(LABEL_IMAGE_REF, parent)])));
        NewSnapshot::plan(kind, key, parent, labels(pairs), &options(), parent_labels)
    }

    #[test]
    fn a_request_is_parsed_once() {
        use Kind::{Active, View};
        use LabelSource::{Administrator, Image, Pod};
        const ON_IMAGE: (&str, &str) = (LABEL_VOLUME, "image");
        const ON_WRITABLE: (&str, &str) = (LABEL_VOLUME, "writable");
        const SIZE: (&str, &str) = (LABEL_OWN_MAX_SIZE, "2Mi");
        const LOWER: (&str, &str) = (LABEL_LOWERS, "/host");
        let default = Some(5 << 20);
        let image = Some(Volume::Image);
        let writable = Some(Volume::Writable);
        type Pairs = &'static [(&'static str, &'static str)];
        // The limit is `None` without a project, `Some(None)` for a project without limit.
        type Row = (
            (Kind, &'static str, &'static str, Pairs),
            (Purpose, LabelSource, Option<Volume>, Option<Option<u64>>),
            &'static [&'static str],
        );
        let unpack = (Purpose::Unpack, Image, image, None);
        let container = (Purpose::Container, Administrator, writable, Some(default));
        let table: &[Row] = &[
            // Rules and limits are for containers, and the labels of an unpack choose
            // nothing.
            ((Active, "a/1/extract-1 x", "", &[]), unpack, &[]),
            (
                (Active, "k8s.io/1/extract-1 x", "ruled", &[SIZE]),
                unpack,
                &[],
            ),
            (
                (
                    Active,
                    "a/1/extract-1 x",
                    "",
                    &[ON_WRITABLE, LOWER, UIDS, GIDS],
                ),
                unpack,
                &[],
            ),
            ((Active, "a/1/web", "", &[]), container, &[]),
            (
                (Active, "a/1/web", "ruled", &[LOWER]),
                container,
                &["/host", "/rule"],
            ),
            ((Active, "a/1/web", "other", &[UIDS, GIDS]), container, &[]),
            (
                (Active, "a/1/web", "", &[ON_IMAGE]),
                (Purpose::Container, Administrator, image, None),
                &[],
            ),
            (
                (Active, "k8s.io/1/web", "ruled", &[SIZE, LOWER, ON_IMAGE]),
                (Purpose::Container, Pod, writable, Some(default)),
                &["/rule"],
            ),
            // A view of a parent has no directory of its own.
            (
                (View, "a/1/extract-1", "ruled", &[LOWER, SIZE]),
                (Purpose::View, Administrator, None, None),
                &["/host"],
            ),
            (
                (View, "k8s.io/1/v", "", &[]),
                (Purpose::View, Pod, image, None),
                &[],
            ),
        ];
        for ((kind, key, parent, labels), expected, host_dirs) in table {
            let asked = format!("{kind} {key} on {parent:?}: {labels:?}");
            let new = plan(*kind, key, parent, labels).unwrap();
            let limit = new.limits.map(|limits| limits.max_bytes);
            let found = (new.purpose, new.label_source, new.volume, limit);
            assert_eq!(found, *expected, "{asked}");
            assert_eq!(new.host_dirs.all(), *host_dirs, "{asked}");
            let are_mapped = labels.contains(&UIDS) && new.purpose != Purpose::Unpack;
            assert_eq!(new.id_maps.is_some(), are_mapped, "{asked}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        use ErrorKind::{FailedPrecondition, InvalidArgument};
        type Pairs = &'static [(&'static str, &'static str)];
        const NO_ROOT: (&str, &str) = (LABEL_UID_MAPPING, "1:1000:10");
        let table: &[(&str, &str, Pairs, ErrorKind)] = &[
            ("", "", &[], InvalidArgument),
            ("a/1/web", "", &[("", "x")], InvalidArgument),
            ("a/1/web", "", &[UIDS], InvalidArgument),
            ("a/1/web", "", &[NO_ROOT, GIDS], InvalidArgument),
            ("a/1/web", "ruled", &[UIDS, GIDS], InvalidArgument),
            ("a/1/web", "", &[(LABEL_OWN_MAX_SIZE, "x")], InvalidArgument),
            (
                "a/1/web",
                "",
                &[(LABEL_LOWERS, "relative")],
                InvalidArgument,
            ),
            (
                "a/1/web",
                "",
                &[(LABEL_VOLUME, "image"), (LABEL_OWN_MAX_SIZE, "2Mi")],
                FailedPrecondition,
            ),
        ];
        for (key, parent, labels, expected) in table {
            let error = plan(Kind::Active, key, parent, labels).unwrap_err();
            assert_eq!(error.kind(), *expected, "{key} on {parent:?}: {labels:?}");
        }
    }

    #[test]
    fn the_split() {
        use Kind::{Active, View};
        use Volume::{Image, Writable};
        const REFERENCE: (&str, &str) = (LABEL_SNAPSHOT_REF, "sha256:1");
        const ON_IMAGE: (&str, &str) = (LABEL_VOLUME, "image");
        const ON_WRITABLE: (&str, &str) = (LABEL_VOLUME, "writable");
        type Pairs = &'static [(&'static str, &'static str)];
        let table: &[(Kind, &str, Pairs, Volume)] = &[
            // The keys and labels with which containerd unpacks.
            (
                Active,
                "default/7/extract-123-AbC sha256:1",
                &[REFERENCE],
                Image,
            ),
            (Active, "default/7/extract-123-AbC sha256:1", &[], Image),
            (Active, "default/7/anything", &[REFERENCE], Image),
            (Active, "k8s.io/7/extract-1 sha256:1", &[REFERENCE], Image),
            // A label that comes from an annotation of a pod.
            (Active, "k8s.io/7/sandbox", &[REFERENCE], Writable),
            // Keys of clients without containerd, which can have any shape.
            (Active, "extract-123 sha256:1", &[], Image),
            (Active, "extract-", &[], Image),
            (Active, "/////extract-1", &[], Image),
            // The key with which containerd copies an image for a user
            // namespace.
            (Active, "default/9/sha256:1-100000-100000-remap", &[], Image),
            (Active, "k8s.io/9/sha256:2-remap", &[], Image),
            // The keys of containers, builds and commits.
            (Active, "default/8/web", &[], Writable),
            (Active, "moby/9/0123abcd-init-key", &[], Writable),
            (Active, "moby/9/0123abcd", &[], Writable),
            (Active, "buildkit/3/xyz", &[], Writable),
            // Keys and labels that resemble an unpack's, but are none.
            (Active, "default/8/extract", &[], Writable),
            (Active, "default/8/my-extract-1", &[], Writable),
            (Active, "default/8/web-remapped", &[], Writable),
            (Active, "a-remap/8/web", &[], Writable),
            (Active, "extract-/8/web", &[], Writable),
            (Active, "extract-1/", &[], Writable),
            (Active, "default/8/EXTRACT-1", &[], Writable),
            (
                Active,
                "web",
                &[("containerd.io/snapshot.reference", "x")],
                Writable,
            ),
            (Active, "/", &[], Writable),
            // A label that the administrator has set.
            (Active, "default/8/web", &[ON_IMAGE], Image),
            (View, "default/8/web", &[ON_WRITABLE], Writable),
            // A label from an image's manifest.
            (
                Active,
                "default/7/extract-1",
                &[REFERENCE, ON_WRITABLE],
                Image,
            ),
            (Active, "default/7/extract-1", &[ON_WRITABLE], Image),
            // Views.
            (View, "default/8/web", &[], Image),
            (View, "default/7/extract-1", &[], Image),
        ];
        for (kind, key, labels, expected) in table {
            let new = plan(*kind, key, "", labels).unwrap();
            assert_eq!(new.volume, Some(*expected), "{kind} {key:?} {labels:?}");
        }
    }

    #[test]
    fn an_unknown_volume_is_refused() {
        for other in ["Image", "ssd", "/mnt", " image"] {
            let error = plan(Kind::Active, "web", "", &[(LABEL_VOLUME, other)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{other}");
        }
    }
}
