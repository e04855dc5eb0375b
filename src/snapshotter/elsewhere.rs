//! Which requests may have to wait for something other than the snapshotter's own disks:
//! for a host directory, which may be on a server that does not answer, or for a layer that
//! has to move first. These functions ask no disk other than the database's.

use super::Snapshotter;
use super::host_dirs::chosen_by;
use crate::error::{Context, Result};
use crate::types::{LABEL_GID_MAPPING, LABEL_LOWERS, LABEL_UID_MAPPING, Labels, Quoted, Volume};

impl Snapshotter {
    /// Whether [`Snapshotter::prepare`] or [`Snapshotter::view`] may have to wait for a
    /// host directory, or for a layer to move. For a request that they will refuse, either
    /// answer is right.
    pub fn creation_waits_elsewhere(&self, parent: &str, labels: &Labels) -> Result<bool> {
        let is_mapped = [LABEL_UID_MAPPING, LABEL_GID_MAPPING]
            .iter()
            .any(|label| labels.contains_key(*label));
        let may_be_shown = !self.options.lowers.allowed.is_empty();
        if may_be_shown && labels.contains_key(LABEL_LOWERS) {
            return Ok(true);
        }
        let has_rules = may_be_shown && !self.options.lower_rules.is_empty();
        if !is_mapped && !has_rules {
            return Ok(false);
        }
        let reader = self.store.read()?;
        let Some(parent) = reader.find(parent)? else {
            return Ok(false);
        };
        let is_chosen =
            has_rules && !chosen_by(&self.options.lower_rules, &parent.info.labels).is_empty();
        let is_unmoved = || -> Result<bool> {
            let chain = reader.chain(parent.id)?;
            Ok(chain.iter().any(|layer| layer.volume == Volume::Writable))
        };
        Ok(is_chosen || is_mapped && is_unmoved()?)
    }

    /// Whether [`Snapshotter::mounts`] may have to wait for a host directory.
    pub fn mounts_wait_elsewhere(&self, key: &str) -> Result<bool> {
        Ok(self.stored(key)?.may_have_host_directories())
    }

    /// Whether [`Snapshotter::update`] may have to wait for a host directory.
    pub fn update_waits_elsewhere(
        &self,
        key: &str,
        mask: &[String],
        given: &Labels,
    ) -> Result<bool> {
        self.plan_update(key, mask, given)
            .and_then(|(_, changes)| self.lowers_to_check(key, &changes))
            .map(|paths| !paths.is_empty())
            .context(|| format!("update snapshot {}", Quoted(key)))
    }
}
