//! Checking the labels, keys and update masks of requests before anything is changed. No
//! I/O.

use crate::error::{Error, ErrorKind, Result};
use crate::store::LabelChange;
use crate::text::idmap::IdMapping;
use crate::types::{LABEL_GID_MAPPING, LABEL_UID_MAPPING, Labels, MAX_LABEL_BYTES, Quoted};
use crate::volume::Owner;

/// Returns an error for an empty key or name; every other string is allowed.
pub fn check_key(what: &str, key: &str) -> Result<()> {
    if key.is_empty() {
        return Err(Error::invalid(format!("the {what} is empty")));
    }
    Ok(())
}

/// Checks labels, and returns those to store: labels with an empty value are left out.
pub fn check_labels(labels: Labels) -> Result<Labels> {
    for (key, value) in &labels {
        check_label(key, value)?;
    }
    Ok(labels
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .collect())
}

fn check_label(key: &str, value: &str) -> Result<()> {
    if key.is_empty() {
        return Err(Error::invalid(format!(
            "the label with value {} has no key",
            Quoted(value)
        )));
    }
    let length = key.len() + value.len();
    if length > MAX_LABEL_BYTES {
        return Err(Error::invalid(format!(
            "label {} has {length} bytes with its value, at most {MAX_LABEL_BYTES} are allowed",
            Quoted(key)
        )));
    }
    Ok(())
}

/// The changes that an Update asks for: `paths` are the paths of its mask,
/// `given` the labels of the snapshot in the request (containerd
/// `core/snapshots/storage/bolt.go`, `UpdateInfo`).
pub fn plan_update(paths: &[String], given: &Labels) -> Result<Vec<LabelChange>> {
    if paths.is_empty() {
        return Ok(vec![LabelChange::Replace(check_labels(given.clone())?)]);
    }
    let change = |path: &String| {
        if path == "labels" {
            return Ok(LabelChange::Replace(check_labels(given.clone())?));
        }
        // Everything after the first dot is the key, including further dots.
        let Some(key) = path.strip_prefix("labels.").filter(|key| !key.is_empty()) else {
            return Err(Error::invalid(format!(
                "field {} cannot be updated, only \"labels\" and \"labels.<key>\" can",
                Quoted(path)
            )));
        };
        match given.get(key).filter(|value| !value.is_empty()) {
            Some(value) => {
                check_label(key, value)?;
                Ok(LabelChange::Set(key.to_owned(), value.clone()))
            }
            None => Ok(LabelChange::Delete(key.to_owned())),
        }
    };
    paths.iter().map(change).collect()
}

/// The id mappings of a snapshot, from its labels.
#[derive(Debug)]
pub struct IdMaps {
    uid: IdMapping,
    gid: IdMapping,
}

impl IdMaps {
    /// Reads the labels that map uids and gids; `None` if both are missing.
    pub fn from_labels(labels: &Labels) -> Result<Option<IdMaps>> {
        let mapping = |label: &str| {
            labels.get(label).map(|text| {
                IdMapping::parse(text).map_err(|error| {
                    Error::caused(
                        ErrorKind::InvalidArgument,
                        format!("read the label {label}"),
                        error,
                    )
                })
            })
        };
        match (
            mapping(LABEL_UID_MAPPING).transpose()?,
            mapping(LABEL_GID_MAPPING).transpose()?,
        ) {
            (None, None) => Ok(None),
            (Some(uid), Some(gid)) => Ok(Some(IdMaps { uid, gid })),
            _ => Err(Error::invalid(format!(
                "the labels {LABEL_UID_MAPPING} and {LABEL_GID_MAPPING} can only be set together"
            ))),
        }
    }

    /// The host's ids for the root of the container.
    pub fn root(&self) -> Result<Owner> {
        match (self.uid.host_id(0), self.gid.host_id(0)) {
            (Some(uid), Some(gid)) => Ok(Owner { uid, gid }),
            _ => Err(Error::invalid(format!(
                "the labels {LABEL_UID_MAPPING} ({}) and {LABEL_GID_MAPPING} ({}) \
                 have to map the container's id 0",
                self.uid, self.gid
            ))),
        }
    }

    /// The mount options that map the ids of the layers.
    pub fn options(&self) -> Vec<String> {
        vec![
            format!("uidmap={}", self.uid),
            format!("gidmap={}", self.gid),
        ]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn labels_may_have_4096_bytes_and_no_more() {
        let long = "v".repeat(MAX_LABEL_BYTES - 3);
        assert!(check_labels(labels(&[("key", &long)])).is_ok());
        let longer = format!("{long}v");
        let error = check_labels(labels(&[("key", &longer)])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        check_labels(labels(&[("", "x")])).unwrap_err();
        let kept = check_labels(labels(&[("a", ""), ("b", "1")])).unwrap();
        assert_eq!(kept, labels(&[("b", "1")]));
    }

    #[test]
    fn an_update_changes_what_its_mask_names() {
        let given = labels(&[("a", "1"), ("b.c/d", "2"), ("e", "")]);
        let plan = |paths: &[&str]| {
            let paths: Vec<_> = paths.iter().map(ToString::to_string).collect();
            plan_update(&paths, &given)
        };
        let all = LabelChange::Replace(labels(&[("a", "1"), ("b.c/d", "2")]));
        assert_eq!(plan(&[]).unwrap(), plan(&["labels"]).unwrap());
        assert_eq!(plan(&["labels"]).unwrap(), [all]);
        assert_eq!(
            plan(&["labels.b.c/d", "labels.e", "labels.z"]).unwrap(),
            [
                LabelChange::Set("b.c/d".into(), "2".into()),
                LabelChange::Delete("e".into()),
                LabelChange::Delete("z".into()),
            ]
        );
        for wrong in ["parent", "name", "kind", "labels.", "Labels", "", "labelsx"] {
            let error = plan(&["labels.a", wrong]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{wrong:?}");
        }
    }

    #[test]
    fn id_maps_go_together_and_map_root() {
        let (uid, gid) = (
            (LABEL_UID_MAPPING, "0:1000:10"),
            (LABEL_GID_MAPPING, "0:2000:10"),
        );
        assert!(IdMaps::from_labels(&labels(&[])).unwrap().is_none());
        let maps = IdMaps::from_labels(&labels(&[uid, gid])).unwrap().unwrap();
        assert_eq!(
            maps.root().unwrap(),
            Owner {
                uid: 1000,
                gid: 2000
            }
        );
        assert_eq!(maps.options(), ["uidmap=0:1000:10", "gidmap=0:2000:10"]);
        assert!(IdMaps::from_labels(&labels(&[uid])).is_err());
        let no_root = labels(&[(LABEL_UID_MAPPING, "1:1000:10"), gid]);
        let error = IdMaps::from_labels(&no_root)
            .unwrap()
            .unwrap()
            .root()
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
