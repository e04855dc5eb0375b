//! Lists what each of containerd's namespaces loses when a command drops snapshots.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{Info, Kind, LABEL_IMAGE_REF};

/// The losses of one of containerd's namespaces.
#[derive(Default)]
pub struct Loss<'a> {
    /// The images that lose a layer, as far as the labels of layers name them.
    pub images: BTreeSet<&'a str>,
    /// The names of lost layers.
    pub layers: BTreeSet<&'a str>,
    /// The names of lost active snapshots and views.
    pub containers: BTreeSet<&'a str>,
}

/// Sorts lost snapshots by namespace. Snapshots without a namespace in their
/// key are under "?".
pub fn losses<'a>(lost: impl Iterator<Item = &'a Info>) -> BTreeMap<&'a str, Loss<'a>> {
    let mut losses = BTreeMap::<&str, Loss<'_>>::new();
    for info in lost {
        let (namespace, name) = split_key(&info.name);
        let loss = losses.entry(namespace).or_default();
        loss.images.extend(image_of(info));
        match info.kind {
            Kind::Committed => loss.layers.insert(name),
            Kind::Active | Kind::View => loss.containers.insert(name),
        };
    }
    losses
}

/// The image that a layer was unpacked for, if its labels name it.
pub fn image_of(info: &Info) -> Option<&str> {
    info.labels.get(LABEL_IMAGE_REF).map(String::as_str)
}

/// Splits a key that containerd has made, `<namespace>/<number>/<name>`, into
/// the namespace and the name.
pub fn split_key(key: &str) -> (&str, &str) {
    let mut parts = key.splitn(3, '/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(namespace), Some(_), Some(name)) => (namespace, name),
        _ => ("?", key),
    }
}
