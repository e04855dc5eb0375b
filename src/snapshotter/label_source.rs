//! Where the labels of a snapshot come from, and which labels count from which source.
//!
//! containerd passes on labels from sources that are not trusted. An unpack has the
//! annotations of the layer's descriptor, which are part of the image's manifest
//! (`core/unpack/unpacker.go`). The sandbox of a pod has the pod's annotations
//! (`internal/cri/server/podsandbox/sandbox_run.go`). Labels that do not count are not
//! stored, so that they cannot take effect later. A stored label that does not count now,
//! because an older version has stored it or because it was trusted then, is left out when
//! the snapshot is read.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::new_snapshot::Purpose;
use super::{PodLabels, Snapshotter};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::store::LabelChange;
use crate::types::{
    Info, Kind, LABEL_GID_MAPPING, LABEL_LOWERS, LABEL_MAX_INODES, LABEL_MAX_SIZE,
    LABEL_OWN_MAX_SIZE, LABEL_SNAPSHOT_REF, LABEL_UID_MAPPING, LABEL_VOLUME, Labels, Quoted,
};
use crate::util::lock::lock;

/// The source of a snapshot's labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LabelSource {
    /// The manifest of an image. Labels from the manifest are on unpacks and on layers.
    Image,
    /// The annotations of a pod.
    Pod,
    /// The administrator of this machine, or a tool that the administrator runs.
    Administrator,
}

/// The labels that images may not set: this program's own labels, and those of
/// containerd that are meant for containers.
const IGNORED_OF_IMAGES: &[&str] = &[
    LABEL_VOLUME,
    LABEL_LOWERS,
    LABEL_OWN_MAX_SIZE,
    LABEL_MAX_INODES,
    LABEL_MAX_SIZE,
    LABEL_UID_MAPPING,
    LABEL_GID_MAPPING,
];

/// The labels that pods may not set: this program's own labels, and the one that marks an
/// unpack. The labels that map ids count, because containerd itself sets them for pods with
/// user namespaces.
const IGNORED_OF_PODS: &[&str] = &[
    LABEL_VOLUME,
    LABEL_LOWERS,
    LABEL_OWN_MAX_SIZE,
    LABEL_MAX_INODES,
    LABEL_SNAPSHOT_REF,
];

/// Whether a key is in `k8s.io`, the namespace in which CRI keeps pods. containerd puts the
/// namespace in front of the key, and no pod can choose it.
pub(super) fn is_of_pods(key: &str) -> bool {
    key.starts_with("k8s.io/")
}

impl LabelSource {
    pub(super) fn of(
        kind: Kind,
        purpose: Purpose,
        key: &str,
        pod_labels: PodLabels,
    ) -> LabelSource {
        match (kind, purpose) {
            (Kind::Committed, _) | (_, Purpose::Unpack) => LabelSource::Image,
            _ if is_of_pods(key) && pod_labels == PodLabels::Ignored => LabelSource::Pod,
            _ => LabelSource::Administrator,
        }
    }

    /// The source of the labels of an existing snapshot.
    pub(super) fn of_stored(info: &Info, pod_labels: PodLabels) -> LabelSource {
        LabelSource::of(info.kind, Purpose::of_stored(info), &info.name, pod_labels)
    }

    fn ignored(self) -> &'static [&'static str] {
        match self {
            LabelSource::Image => IGNORED_OF_IMAGES,
            LabelSource::Pod => IGNORED_OF_PODS,
            LabelSource::Administrator => &[],
        }
    }

    /// Removes the labels that do not count from this source, and returns their keys.
    pub(super) fn take_ignored(self, labels: &mut Labels) -> Vec<&'static str> {
        let ignored = self.ignored().iter().copied();
        ignored
            .filter(|label| labels.remove(*label).is_some())
            .collect()
    }

    /// Removes the labels that do not count from the changes of an Update, and returns
    /// their keys.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the Update's mask names such a label. Only a
    /// person sends such a mask; containerd sends all labels, including those that are
    /// not trusted, without a mask.
    pub(super) fn take_ignored_changes(
        self,
        changes: &mut [LabelChange],
    ) -> Result<Vec<&'static str>> {
        let mut taken = Vec::new();
        for change in changes {
            match change {
                LabelChange::Replace(labels) => taken.extend(self.take_ignored(labels)),
                LabelChange::Set(label, _) if self.ignored().contains(&label.as_str()) => {
                    return Err(Error::refused(format!(
                        "the label {label} does not count on this snapshot: {}",
                        self.reason(label)
                    )));
                }
                LabelChange::Set(..) | LabelChange::Delete(_) => {}
            }
        }
        Ok(taken)
    }

    /// Why a label from this source is ignored, and what to do instead.
    fn reason(self, label: &str) -> &'static str {
        match self {
            LabelSource::Pod if label == LABEL_SNAPSHOT_REF => {
                "in the namespace k8s.io only the key of a snapshot marks it as an unpack"
            }
            LabelSource::Pod => {
                "in the namespace k8s.io this label may come from a pod's annotations; give the \
                 daemon --trust-labels-from k8s.io if only administrators make pods"
            }
            LabelSource::Image | LabelSource::Administrator => {
                "on layers and unpacks this label may come from an image's manifest; set it on \
                 containers instead"
            }
        }
    }
}

/// The ignored labels that have been logged. Each is logged once for each source, because
/// there is no limit to the number of images and pods with such labels.
#[derive(Default)]
pub(super) struct IgnoredLabels {
    named: Mutex<BTreeSet<(LabelSource, &'static str)>>,
}

impl IgnoredLabels {
    /// Logs the ignored labels of a snapshot that have not been logged yet for their
    /// source.
    pub(super) fn note(&self, source: LabelSource, key: &str, ignored: &[&'static str]) {
        for label in ignored {
            if lock(&self.named).insert((source, label)) {
                log::warn!(
                    "the label {label} of snapshot {} is ignored: {} (this is logged \
                     once for all snapshots)",
                    Quoted(key),
                    source.reason(label)
                );
            }
        }
    }
}

impl Snapshotter {
    /// Removes the labels that do not count from the information of a stored snapshot.
    pub(super) fn leave_out_ignored(&self, info: &mut Info) {
        LabelSource::of_stored(info, self.options.pod_labels).take_ignored(&mut info.labels);
    }
}

#[cfg(test)]
mod tests {
    use super::super::labels::tests::labels;
    use super::super::new_snapshot::NewSnapshot;
    use super::super::new_snapshot::tests::options;
    use super::*;
    use crate::error::ErrorKind;
    use crate::types::Timestamp;

    type Pairs = &'static [(&'static str, &'static str)];

    /// Every label that has an effect; the two labels of id mappings are set together.
    const CHOICES: [Pairs; 9] = [
        &[(LABEL_VOLUME, "image")],
        &[(LABEL_VOLUME, "writable")],
        &[(LABEL_LOWERS, "/host")],
        &[(LABEL_OWN_MAX_SIZE, "2Mi")],
        &[(LABEL_MAX_INODES, "100")],
        &[(LABEL_MAX_SIZE, "2097152")],
        &[(LABEL_MAX_SIZE, "6291456")],
        &[
            (LABEL_UID_MAPPING, "0:1000:10"),
            (LABEL_GID_MAPPING, "0:1000:10"),
        ],
        &[(LABEL_SNAPSHOT_REF, "sha256:1")],
    ];

    const UNPACK: &str = "extract-123456789-AbCd sha256:1";
    const SANDBOX: &str = "6c1f2a4b8d0e";

    /// The plan for a request with these labels.
    fn outcome(kind: Kind, key: &str, pairs: &[(&str, &str)], pod_labels: PodLabels) -> String {
        let options = crate::snapshotter::Options {
            pod_labels,
            ..options()
        };
        let new = NewSnapshot::plan(kind, key, "base", labels(pairs), &options, || Ok(None));
        let new = new.unwrap();
        let id_maps = new.id_maps.map(|maps| maps.options());
        let chosen = (new.purpose, new.volume, new.limits, new.host_dirs, id_maps);
        format!("{chosen:?}")
    }

    /// Whether a label has an effect on a container in its namespace. The default limit
    /// is 5 MiB.
    fn counts(pairs: Pairs, is_pod: bool) -> bool {
        match pairs[0] {
            // Containers are on the writable volume without this label, too.
            (LABEL_VOLUME, "writable") => false,
            (LABEL_MAX_SIZE, "2097152") | (LABEL_UID_MAPPING, _) => true,
            _ => !is_pod,
        }
    }

    #[test]
    fn every_label_counts_only_where_its_source_may_choose() {
        for namespace in ["default", "k8s.io", "moby"] {
            for (last, pod_labels) in [
                (UNPACK, PodLabels::Ignored),
                (UNPACK, PodLabels::Trusted),
                (SANDBOX, PodLabels::Ignored),
                (SANDBOX, PodLabels::Trusted),
                ("web", PodLabels::Ignored),
            ] {
                let key = format!("{namespace}/7/{last}");
                let plain = outcome(Kind::Active, &key, &[], pod_labels);
                for pairs in CHOICES {
                    let found = outcome(Kind::Active, &key, pairs, pod_labels) != plain;
                    let is_pod = namespace == "k8s.io"
                        && (pod_labels == PodLabels::Ignored || pairs[0].0 == LABEL_SNAPSHOT_REF);
                    let expected = last != UNPACK && counts(pairs, is_pod);
                    assert_eq!(found, expected, "{key} {pod_labels:?} {pairs:?}");
                }
            }
        }
    }

    #[test]
    fn what_only_the_label_marks_as_an_unpack_is_one_without_choices() {
        const REFERENCE: (&str, &str) = (LABEL_SNAPSHOT_REF, "sha256:1");
        for key in ["default/7/tmp-1", "moby/7/tmp-1"] {
            let plain = outcome(Kind::Active, key, &[REFERENCE], PodLabels::Ignored);
            for pairs in CHOICES {
                let pairs = [&[REFERENCE], pairs].concat();
                let found = outcome(Kind::Active, key, &pairs, PodLabels::Ignored);
                assert_eq!(found, plain, "{pairs:?}");
            }
        }
    }

    #[test]
    fn what_does_not_count_is_not_kept() {
        let all = CHOICES.concat();
        let other = [("containerd.io/snapshot/other", "x")];
        let kept = |source: LabelSource| {
            let mut given = labels(&[&all[..], &other].concat());
            let ignored = source.take_ignored(&mut given);
            assert!(ignored.iter().all(|label| !given.contains_key(*label)));
            given.into_keys().collect::<Vec<_>>()
        };
        let [reference, other] = [LABEL_SNAPSHOT_REF, other[0].0];
        assert_eq!(kept(LabelSource::Image), [reference, other]);
        let ids = [LABEL_GID_MAPPING, LABEL_UID_MAPPING];
        assert_eq!(
            kept(LabelSource::Pod),
            [ids[0], LABEL_MAX_SIZE, other, ids[1]]
        );
        assert_eq!(kept(LabelSource::Administrator).len(), 9);
    }

    #[test]
    fn an_update_takes_out_what_comes_with_all_labels_and_refuses_what_it_names() {
        let now = Timestamp::from_nanos(0);
        let source = |kind, name: &str, pairs: &[(&str, &str)]| {
            let info = Info {
                name: name.to_owned(),
                parent: String::new(),
                kind,
                created: now,
                updated: now,
                labels: labels(pairs),
            };
            LabelSource::of_stored(&info, PodLabels::Ignored)
        };
        let sandbox = source(Kind::Active, "k8s.io/7/6c1f", &[]);
        let layer = source(Kind::Committed, "moby/7/sha256:1", &[]);
        let unpack = source(Kind::Active, "a/1/x", &[(LABEL_SNAPSHOT_REF, "sha256:1")]);
        assert_eq!(sandbox, LabelSource::Pod);
        assert_eq!((layer, unpack), (LabelSource::Image, LabelSource::Image));
        for source in [sandbox, layer] {
            let given = labels(&[(LABEL_LOWERS, "/host"), ("other", "x")]);
            let mut all = [LabelChange::Replace(given)];
            let ignored = source.take_ignored_changes(&mut all).unwrap();
            assert_eq!(ignored, [LABEL_LOWERS]);
            assert_eq!(all, [LabelChange::Replace(labels(&[("other", "x")]))]);

            let named = LabelChange::Set(LABEL_LOWERS.to_owned(), "/host".to_owned());
            let error = source.take_ignored_changes(&mut [named]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
            assert!(error.chain().contains(LABEL_LOWERS), "{}", error.chain());
            // Labels that an older version has stored can be deleted.
            let deleted = LabelChange::Delete(LABEL_LOWERS.to_owned());
            assert!(source.take_ignored_changes(&mut [deleted]).is_ok());
        }
        let named = LabelChange::Set(LABEL_LOWERS.to_owned(), "/host".to_owned());
        let container = source(Kind::Active, "moby/7/6c1f", &[]);
        assert_eq!(container, LabelSource::Administrator);
        assert!(container.take_ignored_changes(&mut [named]).is_ok());
    }
}
