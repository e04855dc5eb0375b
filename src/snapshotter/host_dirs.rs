//! Host directories above a snapshot's layers: which ones a snapshot gets, and when its
//! links to them are created and removed.
//!
//! A label of the snapshot names some host directories, and a change of the label takes
//! effect with the next mount. Rules for the snapshot's image choose others: once, when the
//! snapshot is created. That choice is recorded; otherwise, a daemon with other rules would
//! show a container other files beneath its writes. Each mount checks again whether the
//! directories are allowed.

use super::Snapshotter;
use super::label_source::is_of_pods;
use super::labels::IdMaps;
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Context, Error, Result};
use crate::host_dirs::{HostDirs, ImageRule, parse_paths};
use crate::store::{LabelChange, Snapshot};
use crate::types::{
    Kind, LABEL_GID_MAPPING, LABEL_IMAGE_REF, LABEL_LOWERS, LABEL_UID_MAPPING, Labels, Quoted,
    SnapshotId,
};

/// The host directories that a snapshot is to have.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct WantedHostDirs {
    /// The host directories that the label of the snapshot names.
    labelled: Vec<String>,
    /// The host directories that the rules for the snapshot's image choose.
    pub chosen: Vec<String>,
}

impl WantedHostDirs {
    /// Reads the label that names host directories. Without the label, there are none.
    pub(super) fn by_label(labels: &Labels) -> Result<WantedHostDirs> {
        let labelled = match labels.get(LABEL_LOWERS) {
            None => Vec::new(),
            Some(text) => parse_paths(text).context(|| format!("read the label {LABEL_LOWERS}"))?,
        };
        Ok(WantedHostDirs {
            labelled,
            chosen: Vec::new(),
        })
    }

    pub(super) fn all(&self) -> Vec<String> {
        [&*self.labelled, &*self.chosen].concat()
    }

    /// Refuses host directories for a container with mapped ids. The mount would have to
    /// map the ids of the host directories, too, and their file systems may not support
    /// that. The container would also see other owners than the administrator.
    pub(super) fn require_plain_ids(&self, id_maps: Option<&IdMaps>) -> Result<()> {
        if id_maps.is_none() || self.labelled.is_empty() && self.chosen.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "host directories ({}) cannot be shown to a container with mapped ids, because \
             their owners would not be mapped: leave out the host directories or the mapping",
            Quoted(&self.all().join(":"))
        )))
    }
}

impl Snapshotter {
    /// Finds the host directories of an existing snapshot for a mount, and returns the
    /// links to them. `chosen` lists the host directories that were recorded when the
    /// snapshot was created.
    pub(super) fn renew_lowers(
        &self,
        snapshot: &Snapshot,
        chosen: Option<&str>,
        id_maps: Option<&IdMaps>,
    ) -> Result<Vec<String>> {
        let info = &snapshot.info;
        let mut wanted = WantedHostDirs::by_label(&info.labels)?;
        wanted.chosen = chosen.map_or(Ok(Vec::new()), parse_paths)?;
        wanted.require_plain_ids(id_maps)?;
        let lowers = self.ensure_host_dirs(&info.name, &wanted)?;
        let image = self.volumes.image();
        if !image.has_host_dir_links(snapshot.id, lowers.targets())? {
            let _claim = self.ids.claim(snapshot.id);
            // If the snapshot was removed meanwhile, nothing would remove the links.
            let now = self.store.read()?.stat(&info.name)?;
            if now.id == snapshot.id {
                image.link_host_dirs(snapshot.id, lowers.targets())?.keep();
            }
        }
        let links = image.host_dir_paths(snapshot.id, lowers.targets().len());
        lowers.keep();
        Ok(links)
    }

    /// Finds the host directories of the snapshot `key`, and creates the missing ones. A
    /// missing directory that the label of a pod names is not created, even if such labels
    /// are trusted.
    ///
    /// # Errors
    ///
    /// Those of [`crate::host_dirs::Policy::ensure`]; [`ErrorKind::FailedPrecondition`] if
    /// a directory that the label of a pod names is missing.
    pub(super) fn ensure_host_dirs(&self, key: &str, wanted: &WantedHostDirs) -> Result<HostDirs> {
        if is_of_pods(key) {
            self.options.lowers.require_present(&wanted.labelled)?;
        }
        self.options.lowers.ensure(&wanted.all())
    }

    /// Returns an error if the snapshot `key` cannot use the host directories `labelled`,
    /// which its label is to name. Creates no directory.
    pub(super) fn check_host_dirs(&self, key: &str, labelled: &[String]) -> Result<()> {
        match is_of_pods(key) {
            true => self.options.lowers.require_present(labelled),
            false => self.options.lowers.check(labelled),
        }
    }

    /// Whether a container on the snapshot sees host directories.
    pub(super) fn has_host_directories(&self, snapshot: &Snapshot) -> Result<bool> {
        let labelled = snapshot.info.labels.get(LABEL_LOWERS);
        let is_labelled = labelled.is_some_and(|text| !text.is_empty());
        Ok(is_labelled || !self.chosen_lowers(snapshot.id)?.is_empty())
    }

    fn chosen_lowers(&self, id: SnapshotId) -> Result<Vec<String>> {
        let recorded = self.store.read()?.chosen_lowers(id)?;
        recorded.map_or(Ok(Vec::new()), |paths| parse_paths(&paths))
    }

    /// The host directories that an Update must find, because the snapshot could not be
    /// mounted without them. There are none unless the Update changes a label that affects
    /// host directories, so unrelated labels can still change after the directories have
    /// disappeared.
    pub(super) fn lowers_to_check(
        &self,
        key: &str,
        changes: &[LabelChange],
    ) -> Result<Vec<String>> {
        let snapshot = self.store.read()?.stat(key)?;
        let mut info = snapshot.info;
        self.leave_out_ignored(&mut info);
        let before = info.labels.clone();
        for change in changes {
            change.clone().apply(&mut info.labels);
        }
        let labels = &info.labels;
        let is_same = |label: &&str| labels.get(*label) == before.get(*label);
        let watched = [LABEL_LOWERS, LABEL_UID_MAPPING, LABEL_GID_MAPPING];
        if info.kind == Kind::Committed || watched.iter().all(is_same) {
            return Ok(Vec::new());
        }
        let mut wanted = WantedHostDirs::by_label(labels)?;
        wanted.chosen = self.chosen_lowers(snapshot.id)?;
        if wanted == WantedHostDirs::default() {
            return Ok(Vec::new());
        }
        wanted.require_plain_ids(IdMaps::from_labels(labels)?.as_ref())?;
        // The recorded host directories are not checked: even if one is not allowed any
        // more, the Update may be right.
        Ok(wanted.labelled)
    }

    /// Removes the links to host directories of a snapshot that was removed, or is a layer
    /// now.
    pub(super) fn drop_lower_links(&self, id: SnapshotId) {
        if let Err(error) = self.volumes.image().remove_host_dir_links(id) {
            // This is no error for the caller, because the snapshot itself is removed or
            // committed.
            log::warn!(
                "snapshot {id} does not need its links to host directories any more, but they \
                 stay in lowers/ until the next start, and do no harm there: {}",
                error.chain()
            );
        }
    }
}

/// The host directories that the rules choose for containers on a layer with these labels,
/// in the order of the rules. A label of the layer names its image.
pub(super) fn chosen_by(rules: &[ImageRule], labels: &Labels) -> Vec<String> {
    let Some(image) = labels.get(LABEL_IMAGE_REF) else {
        return Vec::new();
    };
    rules
        .iter()
        .filter(|rule| rule.matches(image))
        .flat_map(|rule| rule.paths().iter().cloned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::labels::tests::labels;
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn mapped_ids_and_host_directories_exclude_each_other() {
        let ids = labels(&[(LABEL_UID_MAPPING, "0:1:9"), (LABEL_GID_MAPPING, "0:1:9")]);
        let maps = IdMaps::from_labels(&ids).unwrap();
        WantedHostDirs::default()
            .require_plain_ids(maps.as_ref())
            .unwrap();
        let wanted = WantedHostDirs {
            labelled: Vec::new(),
            chosen: vec!["/a".to_owned()],
        };
        wanted.require_plain_ids(None).unwrap();
        let error = wanted.require_plain_ids(maps.as_ref()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.chain().contains("mapped ids"), "{}", error.chain());
    }

    #[test]
    fn rules_go_by_the_topmost_layers_image_in_their_order() {
        let rules: Vec<_> = ["*=/a", "x/*=/b:/c", "y/*=/d", "x/one:1=/e"]
            .iter()
            .map(|rule| ImageRule::parse(rule).unwrap())
            .collect();
        let of = |image| chosen_by(&rules, &labels(&[(LABEL_IMAGE_REF, image)]));
        assert_eq!(of("x/one:1"), ["/a", "/b", "/c", "/e"]);
        assert_eq!(of("y/one:1"), ["/a", "/d"]);
        assert!(chosen_by(&rules, &labels(&[])).is_empty());
    }
}
