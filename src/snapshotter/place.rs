//! Which volume a snapshot's directory goes to, by one pure function.
//!
//! What is unpacked is going to be an image layer and belongs on the image
//! volume. containerd tells an unpack apart in two ways, of which some callers
//! use only one: the label that names the layer to come, and a key beginning
//! with `extract-` (`core/snapshots/snapshotter.go`, `UnpackKeyPrefix`).
//! Everything else that is active is written to by a container.

use crate::error::{Error, Result};
use crate::types::{Kind, LABEL_SNAPSHOT_REF, LABEL_VOLUME, Labels, Quoted, Volume};

/// Whether the snapshot is being unpacked into.
pub fn is_unpack(key: &str, labels: &Labels) -> bool {
    // containerd puts `<namespace>/<number>/` before the key; a direct client
    // may put anything, or nothing.
    let last = key.rsplit('/').next().unwrap_or(key);
    labels.contains_key(LABEL_SNAPSHOT_REF) || last.starts_with("extract-")
}

/// The volume for a new snapshot of that kind.
///
/// # Errors
///
/// [`crate::error::ErrorKind::InvalidArgument`] if [`LABEL_VOLUME`] names no volume.
pub fn choose_volume(kind: Kind, key: &str, labels: &Labels) -> Result<Volume> {
    match labels.get(LABEL_VOLUME).map(String::as_str) {
        Some("image") => Ok(Volume::Image),
        Some("writable") => Ok(Volume::Writable),
        Some(other) => Err(Error::invalid(format!(
            "label {LABEL_VOLUME} is {}, it has to be \"image\" or \"writable\"",
            Quoted(other)
        ))),
        // Nothing is ever written into a view.
        None if kind == Kind::View || is_unpack(key, labels) => Ok(Volume::Image),
        None => Ok(Volume::Writable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn the_split() {
        use Kind::{Active, View};
        use Volume::{Image, Writable};
        const REFERENCE: (&str, &str) = (LABEL_SNAPSHOT_REF, "sha256:1");
        const ON_IMAGE: (&str, &str) = (LABEL_VOLUME, "image");
        const ON_WRITABLE: (&str, &str) = (LABEL_VOLUME, "writable");
        type Pairs = &'static [(&'static str, &'static str)];
        let table: &[(Kind, &str, Pairs, Volume)] = &[
            // How containerd unpacks.
            (
                Active,
                "default/7/extract-123-AbC sha256:1",
                &[REFERENCE],
                Image,
            ),
            (Active, "default/7/extract-123-AbC sha256:1", &[], Image),
            (Active, "k8s.io/7/anything", &[REFERENCE], Image),
            // A direct client's keys, in any shape.
            (Active, "extract-123 sha256:1", &[], Image),
            (Active, "extract-", &[], Image),
            (Active, "/////extract-1", &[], Image),
            // How containers run, are built and committed.
            (Active, "default/8/web", &[], Writable),
            (Active, "moby/9/0123abcd-init-key", &[], Writable),
            (Active, "moby/9/0123abcd", &[], Writable),
            (Active, "buildkit/3/xyz", &[], Writable),
            // Nearly an unpack, and yet none.
            (Active, "default/8/extract", &[], Writable),
            (Active, "default/8/my-extract-1", &[], Writable),
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
            // By hand.
            (Active, "default/8/web", &[ON_IMAGE], Image),
            (
                Active,
                "default/7/extract-1",
                &[REFERENCE, ON_WRITABLE],
                Writable,
            ),
            (View, "default/8/web", &[ON_WRITABLE], Writable),
            // Views.
            (View, "default/8/web", &[], Image),
            (View, "default/7/extract-1", &[], Image),
        ];
        for (kind, key, labels, expected) in table {
            let labels = labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect();
            let chosen = choose_volume(*kind, key, &labels).unwrap();
            assert_eq!(chosen, *expected, "{kind} {key:?} {labels:?}");
        }
    }

    #[test]
    fn an_unknown_volume_is_refused() {
        for other in ["Image", "ssd", "/mnt", " image"] {
            let labels = [(LABEL_VOLUME.to_owned(), other.to_owned())].into();
            let error = choose_volume(Kind::Active, "web", &labels).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{other}");
        }
    }
}
