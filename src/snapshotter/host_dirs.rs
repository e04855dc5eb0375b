//! Host directories above a snapshot's layers: which ones a snapshot gets, and
//! when its links to them are created and removed.
//!
//! A label names some of them; a change of the label takes effect with the next
//! mount. Others are chosen by the image: once, when the snapshot is created,
//! and the choice is recorded. Otherwise, a daemon that was started with other
//! flags would show a container other files beneath what it has written.
//! Whether a directory is allowed is checked at each mount: one that is not
//! allowed any more is not shown any more.

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
    /// The host directories that the snapshot's label names.
    labelled: Vec<String>,
    /// The host directories that the image of the snapshot gives it.
    pub chosen: Vec<String>,
}

impl WantedHostDirs {
    /// The host directories that a label names.
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

    /// Refuses host directories for a container with mapped ids. The mount
    /// would have to map the ids of the host directories too, whose file
    /// systems may not support that, and the container would see other owners
    /// than the administrator.
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
    /// Finds the host directories of an existing snapshot again, and returns the
    /// links to them. `chosen` are the recorded ones.
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
            // A snapshot that was removed meanwhile would get links that
            // nothing removes.
            let now = self.store.read()?.stat(&info.name)?;
            if now.id == snapshot.id {
                image.link_host_dirs(snapshot.id, lowers.targets())?.keep();
            }
        }
        let links = image.host_dir_paths(snapshot.id, lowers.targets().len());
        lowers.keep();
        Ok(links)
    }

    /// Finds the host directories of the snapshot of that key, and creates those that are
    /// missing; but a pod's label, trusted or not, creates none.
    ///
    /// # Errors
    ///
    /// As of [`crate::host_dirs::Policy::ensure`]; [`ErrorKind::FailedPrecondition`] for one
    /// that is missing and named by a pod's label.
    pub(super) fn ensure_host_dirs(&self, key: &str, wanted: &WantedHostDirs) -> Result<HostDirs> {
        if is_of_pods(key) {
            self.options.lowers.require_present(&wanted.labelled)?;
        }
        self.options.lowers.ensure(&wanted.all())
    }

    /// Looks whether the host directories that a label of the snapshot of that key is to
    /// name can be used; creates none.
    pub(super) fn check_host_dirs(&self, key: &str, labelled: &[String]) -> Result<()> {
        match is_of_pods(key) {
            true => self.options.lowers.require_present(labelled),
            false => self.options.lowers.check(labelled),
        }
    }

    /// Whether a container on the snapshot is shown host directories.
    pub(super) fn has_host_directories(&self, snapshot: &Snapshot) -> Result<bool> {
        let labelled = snapshot.info.labels.get(LABEL_LOWERS);
        let is_labelled = labelled.is_some_and(|text| !text.is_empty());
        Ok(is_labelled || !self.chosen_lowers(snapshot.id)?.is_empty())
    }

    fn chosen_lowers(&self, id: SnapshotId) -> Result<Vec<String>> {
        let recorded = self.store.read()?.chosen_lowers(id)?;
        recorded.map_or(Ok(Vec::new()), |paths| parse_paths(&paths))
    }

    /// The host directories that an Update must find, so that it does not leave the
    /// snapshot unmountable. Only labels that affect host directories are looked at, so
    /// unrelated labels can still change after those directories have disappeared.
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
        // Recorded ones are not checked: if one is not allowed any more, the
        // Update can still be right.
        Ok(wanted.labelled)
    }

    /// Removes the links of a snapshot that was removed, or is a layer now.
    pub(super) fn drop_lower_links(&self, id: SnapshotId) {
        if let Err(error) = self.volumes.image().remove_host_dir_links(id) {
            // The snapshot itself is gone or committed; the next start removes
            // the links.
            log::warn!(
                "cannot remove the links of snapshot {id}: {}",
                error.chain()
            );
        }
    }
}

/// The host directories that the rules give to the containers of a layer's
/// image, in the order of the rules.
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
