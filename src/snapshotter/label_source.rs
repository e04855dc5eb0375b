//! Whose word a snapshot's labels are, and which of them count for that reason.
//!
//! containerd hands strangers' labels on. What it unpacks has the annotations of the
//! layer's descriptor, which the image's manifest contains (`core/unpack/unpacker.go`);
//! the sandbox of a pod has the pod's annotations
//! (`internal/cri/server/podsandbox/sandbox_run.go`). Labels that do not count are not
//! stored, so that they cannot act later; those that were stored by an older version, or
//! trusted then, are left out when a snapshot is read.

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

/// Whose word the labels of a snapshot are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LabelSource {
    /// The manifest of the image that is unpacked, or was unpacked into a layer.
    Image,
    /// The annotations of a pod.
    Pod,
    /// The administrator of this machine, or a tool that the administrator runs.
    Administrator,
}

/// What no image may choose: all that is ours alone, and what containerd means for
/// containers.
const IGNORED_OF_IMAGES: &[&str] = &[
    LABEL_VOLUME,
    LABEL_LOWERS,
    LABEL_OWN_MAX_SIZE,
    LABEL_MAX_INODES,
    LABEL_MAX_SIZE,
    LABEL_UID_MAPPING,
    LABEL_GID_MAPPING,
];

/// What no pod may choose: all that is ours alone, and what makes a snapshot an unpack.
/// containerd maps the ids of pods with user namespaces by its own labels.
const IGNORED_OF_PODS: &[&str] = &[
    LABEL_VOLUME,
    LABEL_LOWERS,
    LABEL_OWN_MAX_SIZE,
    LABEL_MAX_INODES,
    LABEL_SNAPSHOT_REF,
];

/// Whether a key is of the namespace in which CRI keeps pods. containerd puts the
/// namespace before the key, and no pod can choose it.
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

    /// Whose word the labels of a snapshot are that is there already.
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

    /// Takes those labels out that do not count, and returns which they were.
    pub(super) fn take_ignored(self, labels: &mut Labels) -> Vec<&'static str> {
        let ignored = self.ignored().iter().copied();
        ignored
            .filter(|label| labels.remove(*label).is_some())
            .collect()
    }

    /// Takes those labels out of an Update that do not count, and returns which they were.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] for a label that the Update's mask names. Only a
    /// person does that; containerd sends all labels, those of strangers too, without a
    /// mask.
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
                        "the label {label} does not count: {}",
                        self.reason(label)
                    )));
                }
                LabelChange::Set(..) | LabelChange::Delete(_) => {}
            }
        }
        Ok(taken)
    }

    /// Why a label of this source is ignored, and what would be right.
    fn reason(self, label: &str) -> &'static str {
        match self {
            LabelSource::Pod if label == LABEL_SNAPSHOT_REF => {
                "in the namespace k8s.io an unpack is known by its key alone"
            }
            LabelSource::Pod => {
                "in the namespace k8s.io it may come from a pod's annotations; give the daemon \
                 --trust-labels-from k8s.io if only administrators make pods"
            }
            LabelSource::Image | LabelSource::Administrator => {
                "on a layer and on what is unpacked it may come from an image's manifest; give \
                 it to containers"
            }
        }
    }
}

/// Which ignored labels the log has named already. Each is named once for each source:
/// images and pods with such labels can be made without end.
#[derive(Default)]
pub(super) struct IgnoredLabels {
    named: Mutex<BTreeSet<(LabelSource, &'static str)>>,
}

impl IgnoredLabels {
    /// Names those in the log that it has not named yet.
    pub(super) fn note(&self, source: LabelSource, key: &str, ignored: &[&'static str]) {
        for label in ignored {
            if lock(&self.named).insert((source, label)) {
                log::warn!(
                    "the label {label} of snapshot {} is ignored: {} (logged once for all \
                     snapshots)",
                    Quoted(key),
                    source.reason(label)
                );
            }
        }
    }
}

impl Snapshotter {
    /// Takes the labels out of a stored snapshot's that do not count.
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

    /// Every label that can choose something, as few as can stand alone.
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

    /// What a request with these labels comes to.
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

    /// Whether a label counts on a container of its namespace. The default limit is 5 MiB.
    fn counts(pairs: Pairs, is_pod: bool) -> bool {
        match pairs[0] {
            // That is where containers are without it.
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
            // Labels that an older version has stored can be taken away.
            let deleted = LabelChange::Delete(LABEL_LOWERS.to_owned());
            assert!(source.take_ignored_changes(&mut [deleted]).is_ok());
        }
        let named = LabelChange::Set(LABEL_LOWERS.to_owned(), "/host".to_owned());
        let container = source(Kind::Active, "moby/7/6c1f", &[]);
        assert_eq!(container, LabelSource::Administrator);
        assert!(container.take_ignored_changes(&mut [named]).is_ok());
    }
}
