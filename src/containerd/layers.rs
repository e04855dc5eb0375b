//! Finds out which content each layer of containerd's images is unpacked from.
//!
//! A layer's name is its chain id: the digest of the digests of its own archive and of all
//! archives below it (image-spec, config.md, "Layer ChainID"). If the chain id that is computed
//! from an image's configuration is the name of a snapshot, the digests in that configuration
//! are right, even if another program has changed it.

use std::collections::HashMap;

use serde_json::Value;

use super::Containerd;
use crate::error::{Error, ErrorKind, Result};
use crate::proto::descriptor::Descriptor;
use crate::types::Quoted;
use crate::util::sha256;

/// The longest JSON document that is read, which is also containerd's limit.
const MAX_JSON_BYTES: usize = 8 << 20;
/// How many values a JSON document may have: each takes up to some hundred bytes of memory,
/// however short it is.
const MAX_JSON_VALUES: usize = 50_000;
/// How deep indexes may be nested, and how many documents one image may have.
const MAX_DEPTH: u32 = 4;
const MAX_DOCUMENTS: u32 = 1000;

/// The content that a layer can be unpacked from.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSource {
    /// The namespace of containerd that has the content.
    pub namespace: String,
    /// An image that contains this layer.
    pub image: String,
    /// The content, which is usually compressed.
    pub blob: Descriptor,
    /// The digest of the unpacked archive.
    pub diff_id: String,
    /// What containerd knows of the content.
    pub standing: Standing,
}

/// What containerd knows of the content that an image names for a layer, ordered from good to
/// bad. This matters because an image may name wrong content for a layer of another image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// containerd has the content, whose unpacked digest is known to be the layer's.
    Proved,
    /// containerd has the content, and does not know the digest of the unpacked layer.
    There,
    /// containerd has the content, but has unpacked it before, with another digest than the
    /// layer's, or needs a plugin to unpack it.
    Other,
    /// containerd does not have the content.
    Missing,
}

/// The label of containerd on content: the digest that it had after unpacking.
const LABEL_UNPACKED: &str = "containerd.io/uncompressed";

/// How many sources of one layer are kept.
const MOST_SOURCES: usize = 32;

/// The layers of all images, by namespace and chain id.
pub struct Sources {
    /// Up to [`MOST_SOURCES`] sources of each layer, the best first.
    by_name: HashMap<(String, String), Vec<LayerSource>>,
    /// Errors about images that could not be read.
    pub problems: Vec<String>,
}

impl Sources {
    /// Asks containerd for the layers of all its images, in all namespaces. Keeps only
    /// the layers for which `is_wanted(namespace, chain id)` returns `true`.
    pub fn find(
        containerd: &Containerd<'_>,
        is_wanted: &dyn Fn(&str, &str) -> bool,
    ) -> Result<Sources> {
        let mut sources = Sources {
            by_name: HashMap::new(),
            problems: Vec::new(),
        };
        for namespace in containerd.namespaces()? {
            for image in containerd.images(&namespace)? {
                let target = image.target.unwrap_or_default();
                let mut reading = Reading {
                    containerd,
                    namespace: &namespace,
                    image: &image.name,
                    documents: 0,
                    is_wanted,
                    sources: &mut sources,
                };
                match reading.document(&target.digest, 0) {
                    Err(error) if is_final(&error) => return Err(error),
                    Err(error) => {
                        let image = Quoted(&image.name);
                        let error = error.while_doing(format!("find the layers of image {image}"));
                        sources.problems.push(error.chain());
                    }
                    Ok(()) => {}
                }
            }
        }
        Ok(sources)
    }

    /// The sources of the layer with this name in this namespace, the best first.
    pub fn of(&self, namespace: &str, name: &str) -> &[LayerSource] {
        let found = self.by_name.get(&(namespace.to_owned(), name.to_owned()));
        found.map_or(&[], Vec::as_slice)
    }

    fn add(&mut self, name: (String, String), source: LayerSource) {
        let known = self.by_name.entry(name).or_default();
        let at = known.partition_point(|other| other.standing <= source.standing);
        known.insert(at, source);
        known.truncate(MOST_SOURCES);
    }
}

/// Whether the error would be the same for every other image.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::Unavailable)
}

struct Reading<'a> {
    containerd: &'a Containerd<'a>,
    namespace: &'a str,
    image: &'a str,
    documents: u32,
    is_wanted: &'a dyn Fn(&str, &str) -> bool,
    sources: &'a mut Sources,
}

impl Reading<'_> {
    /// Reads an index or a manifest. Its absence is not an error, because containerd usually
    /// has only the manifests for this machine's platform.
    fn document(&mut self, digest: &str, depth: u32) -> Result<()> {
        self.documents += 1;
        if depth > MAX_DEPTH || self.documents > MAX_DOCUMENTS {
            return Ok(());
        }
        let Some(document) = self.json(digest)? else {
            return Ok(());
        };
        for part in array(&document, "manifests") {
            if let Some(digest) = part["digest"].as_str() {
                self.document(digest, depth + 1)?;
            }
        }
        match document["config"]["digest"].as_str() {
            Some(config) => self.manifest(&document, config),
            None => Ok(()),
        }
    }

    fn manifest(&mut self, manifest: &Value, config: &str) -> Result<()> {
        let Some(config) = self.json(config)? else {
            return Ok(());
        };
        let mut chain = String::new();
        let diff_ids = array(&config["rootfs"], "diff_ids");
        for (diff_id, layer) in diff_ids.iter().zip(array(manifest, "layers")) {
            let Some(diff_id) = diff_id.as_str() else {
                return Ok(());
            };
            chain = match chain.as_str() {
                "" => diff_id.to_owned(),
                below => sha256::digest(format!("{below} {diff_id}").as_bytes()),
            };
            self.layer(&chain, diff_id, layer)?;
        }
        Ok(())
    }

    fn layer(&mut self, name: &str, diff_id: &str, layer: &Value) -> Result<()> {
        let key = (self.namespace.to_owned(), name.to_owned());
        let text = |name: &str| layer[name].as_str().unwrap_or_default();
        let (digest, media_type) = (text("digest"), text("mediaType"));
        let is_same = |known: &LayerSource| {
            known.blob.digest == digest && known.blob.media_type == media_type
        };
        let known = self.sources.of(self.namespace, name);
        if known.iter().any(is_same) || !(self.is_wanted)(self.namespace, name) {
            return Ok(());
        }
        let info = self.containerd.content_info(self.namespace, digest)?;
        let unpacked = info.as_ref().map(|info| info.labels.get(LABEL_UNPACKED));
        let standing = match unpacked {
            None => Standing::Missing,
            Some(_) if !is_layer_type(media_type) => Standing::Other,
            Some(_) if digest == diff_id => Standing::Proved,
            Some(None) => Standing::There,
            Some(Some(unpacked)) if unpacked == diff_id => Standing::Proved,
            Some(Some(_)) => Standing::Other,
        };
        let blob = Descriptor {
            media_type: media_type.to_owned(),
            digest: digest.to_owned(),
            size: info.map_or(0, |info| info.size),
            ..Descriptor::default()
        };
        let source = LayerSource {
            namespace: self.namespace.to_owned(),
            image: self.image.to_owned(),
            blob,
            diff_id: diff_id.to_owned(),
            standing,
        };
        self.sources.add(key, source);
        Ok(())
    }

    fn json(&self, digest: &str) -> Result<Option<Value>> {
        let read = self
            .containerd
            .read(self.namespace, digest, MAX_JSON_BYTES)?;
        read.map(|text| {
            let begins_value = |byte: &&u8| matches!(byte, b'[' | b'{' | b',');
            if text.iter().filter(begins_value).count() > MAX_JSON_VALUES {
                let digest = Quoted(digest);
                return Err(Error::data_loss(format!(
                    "the document {digest} has more than {MAX_JSON_VALUES} JSON values"
                )));
            }
            serde_json::from_slice(&text).map_err(|error| {
                let what = format!("read {} as JSON", Quoted(digest));
                Error::caused(ErrorKind::DataLoss, what, error)
            })
        })
        .transpose()
    }
}

/// Whether content of this type is a layer that containerd unpacks without a plugin.
fn is_layer_type(media_type: &str) -> bool {
    const KINDS: [&str; 4] = [
        "application/vnd.oci.image.layer.v1",
        "application/vnd.oci.image.layer.nondistributable.v1",
        "application/vnd.docker.image.rootfs.diff",
        "application/vnd.docker.image.rootfs.foreign.diff",
    ];
    const FORMS: [&str; 5] = [".tar", ".tar+gzip", ".tar+zstd", ".tar.gzip", ".tar.zstd"];
    let forms = KINDS
        .iter()
        .filter_map(|kind| media_type.strip_prefix(kind));
    forms.into_iter().any(|form| FORMS.contains(&form))
}

fn array<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}
